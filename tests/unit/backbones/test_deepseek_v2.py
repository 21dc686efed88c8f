"""Multi-latent attention in config.json: widths, YaRN, and what is not built."""

import pytest

from megatron_moellava.backbones import FAMILIES, LatentAttention, YarnScaling, backbone_from_hf_config, get_backbone
from megatron_moellava.backbones.from_config import hf_config_of
from megatron_moellava.config import ConfigError

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}


def read(**changes):
    config = hf_config_of(get_backbone("deepseek-v3-tiny")) | changes
    return backbone_from_hf_config(config, FAMILIES, name="folder")


def test_widths_that_are_absent_are_those_of_the_config_class_and_null_is_no_latent():
    config = hf_config_of(get_backbone("deepseek-v3-tiny"))
    for key in ("q_lora_rank", "kv_lora_rank", "v_head_dim"):
        del config[key]
    found = backbone_from_hf_config(config, FAMILIES, name="folder").multi_latent_attention
    assert found == LatentAttention(
        q_lora_rank=1536, kv_lora_rank=512, qk_head_dim=24, qk_pos_emb_head_dim=8, v_head_dim=128
    )
    backbone = read(q_lora_rank=None)
    assert backbone.multi_latent_attention.q_lora_rank is None
    assert (backbone.kv_channels, backbone.rotary_channels, backbone.value_channels) == (32, 8, 32)


def test_a_scaling_says_what_it_leaves_out_as_published_code_does():
    """Without both weights the logits grow as YaRN's paper has it, and the softmax is left alone."""
    plain = read(rope_scaling=YARN).yarn
    assert plain == YarnScaling(factor=4.0, original_max_position_embeddings=512)
    assert plain.attention_factor == pytest.approx(1.1386294) and plain.mscale_all_dim == 0.0
    weighted = read(rope_scaling=YARN | {"type": "yarn", "mscale": 1.0, "mscale_all_dim": 1.0, "truncate": True}).yarn
    assert weighted.attention_factor == 1.0
    assert read(rope_scaling=None).yarn is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_lora_rank": 0}, "kv_lora_rank=0: must be a whole number above 0"),
        ({"q_lora_rank": -1}, "q_lora_rank=-1: must be a whole number above 0, or null"),
        ({"num_key_value_heads": 2}, "num_key_value_heads=2 with num_attention_heads=4"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling of type 'linear': only 'yarn'"),
        ({"rope_scaling": YARN | {"attention_factor": 1.2}}, "rope_scaling has attention_factor"),
        ({"rope_scaling": YARN | {"truncate": False}}, "rope_scaling has truncate"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling lacks original_max_position_embeddings"),
        ({"rope_scaling": YARN | {"mscale": 0.7}}, "mscale=0.7 with mscale_all_dim=None: there must be both"),
        ({"rope_scaling": YARN | {"factor": "four"}}, "factor='four': must be a number"),
        ({"attention_bias": True}, "attention_bias=True: only False"),
    ],
)
def test_what_is_not_built_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        read(**changes)
