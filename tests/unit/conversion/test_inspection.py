"""What a checkpoint is said to hold."""

import json
from dataclasses import replace

import pytest
from safetensors.torch import load_file, save_file

from megatron_moellava.config import CheckpointError, ConfigError, MoEConfig
from megatron_moellava.conversion.exports import export_checkpoint
from megatron_moellava.conversion.inspection import diff, inspect
from megatron_moellava.conversion.megatron_checkpoint import open_checkpoint
from megatron_moellava.conversion.upcycle import upcycle_checkpoint
from megatron_moellava.costs.parameters import token_flops
from tests.helpers.conversion_models import original_config, original_state, write_folder


def test_inspect_and_diff_say_what_is_there(dense, tmp_path):
    folder, _ = dense
    upcycle_checkpoint(folder, save=tmp_path / "moe", moe=MoEConfig(placement=(2,)))
    text = inspect(tmp_path / "moe")
    for part in (
        "layers 2",
        "4 experts, top-2",
        "EP 0, ETP 1",
        "operation upcycle",
        "layers.0-3.",
        "activated per token",
    ):
        assert part in text
    differences, same = diff(folder, tmp_path / "moe")
    assert {item.name.split(".layers.2.mlp.")[0] for item in differences} == {"language_model.decoder"} and same > 50
    assert diff(folder, folder)[0] == []


def test_inspect_says_what_narrow_experts_compute(dense, tmp_path):
    folder, _ = dense
    model = open_checkpoint(folder).model
    width = model.backbone.ffn_hidden_size // 4
    moe = MoEConfig(num_moe_experts=16, moe_router_topk=8, moe_ffn_hidden_size=width)
    upcycle_checkpoint(folder, save=tmp_path / "moe", moe=moe)
    text = inspect(tmp_path / "moe")
    flops = token_flops(replace(model, moe=moe))
    assert f"16 experts, top-8, layers 0, 2, each {width} wide ({4 * width})" in text
    assert f"{flops / 1e9:.3g} GFLOPs per token forward" in text and "granularity 4" in text
    with pytest.raises(ConfigError, match=f"moe_ffn_hidden_size={width}: MoE-LLaVA's own experts have the width"):
        export_checkpoint(tmp_path / "moe", save=tmp_path / "out", layout="original")
    assert not (tmp_path / "out").exists()


def test_a_folder_from_outside_says_which_model_it_is(dense, tmp_path):
    folder, _ = dense
    upcycle_checkpoint(folder, save=tmp_path / "moe", moe=MoEConfig(placement=(2,)))
    export_checkpoint(tmp_path / "moe", save=tmp_path / "out", layout="original")
    for path in (tmp_path / "moe", tmp_path / "out"):
        text = inspect(path)
        assert "4 layers of width" in text and "no published size" in text and "4 experts, top-2, layers 2" in text
    assert "MoE-LLaVA, as released" in inspect(tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text()) | {"model_type": "gemma2"}
    (tmp_path / "out/config.json").write_text(json.dumps(config))
    assert "config.json  model_type='gemma2' is not a supported backbone" in inspect(tmp_path / "out", verify=False)


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_diff_finds_a_tensor_under_the_names_of_every_layout(dense, tmp_path, kind):
    """A checkpoint and its exports are the same; one changed number is seen under Megatron's name.

    transformers' LLaVA has a token of its own for images, and Qwen2-MoE q, k and v biases: these are all that differs.
    """
    folder, _ = dense
    if kind == "moe":
        upcycle_checkpoint(folder, save=tmp_path / "moe", moe=MoEConfig(placement=(2,)))
        folder = tmp_path / "moe"
    export_checkpoint(folder, save=tmp_path / "original", layout="original")
    for pair in ((folder, tmp_path / "original"), (tmp_path / "original", folder)):
        differences, same = diff(*pair)
        assert differences == [] and same > 50

    export_checkpoint(folder, save=tmp_path / "transformers", layout="transformers")
    if (tmp_path / "transformers/modeling_moe_llava.py").exists():
        with pytest.raises(CheckpointError, match="an export with a modelling file, for transformers alone"):
            diff(folder, tmp_path / "transformers")
    else:
        differences, same = diff(folder, tmp_path / "transformers")
        added = ("embedding.word_embeddings.weight", "output_layer.weight", "output_layer.bias", "linear_qkv.bias")
        assert all(item.name.endswith(added) for item in differences) and same > 50

    file = tmp_path / "original" / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("layers.1.self_attn.k_proj.weight"))
    tensors[name][3, 5] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    ((found,), _) = diff(folder, tmp_path / "original", verify=False)
    assert found.name == "language_model.decoder.layers.1.self_attention.linear_qkv.weight"
    assert "values, largest difference" in found.what


def test_diff_of_two_layouts_says_why_a_folder_cannot_be_read_as_the_other(dense, tmp_path):
    folder, _ = dense
    export_checkpoint(folder, save=tmp_path / "out", layout="original")
    (tmp_path / "out" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"is a Megatron checkpoint and .* as an import of .* config.json"):
        diff(folder, tmp_path / "out", verify=False)


def test_diff_measures_changed_values(tmp_path):
    state, config = original_state("llama", "dense"), original_config("llama", "dense")
    write_folder(tmp_path / "a", state, config)
    changed = dict(state)
    changed["model.norm.weight"] = state["model.norm.weight"].clone()
    changed["model.norm.weight"][3] += 2
    changed["lm_head.weight"] = state["lm_head.weight"].float()
    write_folder(tmp_path / "b", changed, config)
    found = {item.name: item.what for item in diff(tmp_path / "a", tmp_path / "b")[0]}
    assert found.keys() == {"model.norm.weight", "lm_head.weight"}
    assert "largest difference 2" in found["model.norm.weight"]
    assert "bfloat16 against float32, largest difference 0 " in found["lm_head.weight"]
