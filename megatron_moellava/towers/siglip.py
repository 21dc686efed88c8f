"""Google's SigLIP and (fixed-resolution) SigLIP 2: no class token, no first norm, patches with bias, tanh GELU.

transformers reads both as `siglip_vision_model`. Features are hidden_states[-2], all 729 of them at 384 pixels.
MoE-LLaVA drops the first as if it were a class token: that is `siglip-so400m-patch14-384-original`, for its released
checkpoints.
"""

from dataclasses import replace

from megatron_moellava.mapping import Mapping, both, copy
from megatron_moellava.towers.clip import BASE_SIZES, BLOCK, NO_PART_OF_FEATURES
from megatron_moellava.towers.tower import Tower, TowerHuggingFace

MAPPING = (
    *both(Mapping, "conv1", "vision_model.embeddings.patch_embedding"),
    copy("position_embeddings.weight", "vision_model.embeddings.position_embedding.weight"),
    *BLOCK,
)
UNUSED = ("encoder.layers.{i}.", "post_layernorm.", "head.")

HF = TowerHuggingFace(
    family="siglip",
    model_type="siglip_vision_model",
    wrapper_model_type="siglip",
    architecture="SiglipVisionModel",
    image_processor="SiglipImageProcessor",
    # vision_use_head only concerns the pooled output, which features do not use.
    constants={"num_channels": 3, "attention_dropout": 0.0},
    inert=("vision_use_head", *NO_PART_OF_FEATURES),
    defaults={"layer_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh", "patch_size": 16, **BASE_SIZES},
)

SIGLIP_SO400M_384 = Tower(
    name="siglip-so400m-patch14-384",
    source="https://huggingface.co/google/siglip-so400m-patch14-384/blob/main/config.json",
    num_layers=27,
    hidden_size=1152,
    ffn_hidden_size=4304,
    num_attention_heads=16,
    image_size=384,
    patch_size=14,
    activation="gelu_tanh",
    layernorm_epsilon=1e-6,
    class_token=False,
    pre_layernorm=False,
    patch_bias=True,
    drop_first_feature=False,
    image_mean=(0.5, 0.5, 0.5),
    image_std=(0.5, 0.5, 0.5),
    resize="square",
    hf=HF,
    mapping=MAPPING,
    unused=UNUSED,
)
SIGLIP_SO400M_384_ORIGINAL = replace(
    SIGLIP_SO400M_384, name="siglip-so400m-patch14-384-original", drop_first_feature=True
)
SIGLIP_BASE_224 = replace(
    SIGLIP_SO400M_384,
    name="siglip-base-patch16-224",
    source="https://huggingface.co/google/siglip-base-patch16-224/blob/main/config.json",
    num_layers=12,
    hidden_size=768,
    ffn_hidden_size=3072,
    num_attention_heads=12,
    image_size=224,
    patch_size=16,
)
SIGLIP2_SO400M_384 = replace(
    SIGLIP_SO400M_384,
    name="siglip2-so400m-patch14-384",
    source="https://huggingface.co/google/siglip2-so400m-patch14-384/blob/main/config.json",
)
SIGLIP2_SO400M_512 = replace(
    SIGLIP_SO400M_384,
    name="siglip2-so400m-patch16-512",
    source="https://huggingface.co/google/siglip2-so400m-patch16-512/blob/main/config.json",
    image_size=512,
    patch_size=16,
)
SIGLIP2_BASE_224 = replace(
    SIGLIP_BASE_224,
    name="siglip2-base-patch16-224",
    source="https://huggingface.co/google/siglip2-base-patch16-224/blob/main/config.json",
)
SIGLIP_TINY = replace(
    SIGLIP_SO400M_384,
    name="siglip-tiny",
    source="this project: the tests",
    num_layers=4,
    hidden_size=128,
    ffn_hidden_size=512,
    num_attention_heads=4,
    image_size=64,
    patch_size=16,
)
SIZES = (
    SIGLIP_SO400M_384,
    SIGLIP_SO400M_384_ORIGINAL,
    SIGLIP_BASE_224,
    SIGLIP2_SO400M_384,
    SIGLIP2_SO400M_512,
    SIGLIP2_BASE_224,
    SIGLIP_TINY,
)
