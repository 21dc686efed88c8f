"""What a checkpoint is said to hold."""

from dataclasses import replace

import pytest

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


def test_diff_refuses_what_calls_its_tensors_by_other_names(dense, tmp_path):
    """A checkpoint and its own export would differ in every line."""
    folder, _ = dense
    for layout in ("original", "transformers"):
        export_checkpoint(folder, save=tmp_path / layout, layout=layout)
    for pair in ((folder, tmp_path / "original"), (tmp_path / "original", tmp_path / "transformers")):
        with pytest.raises(CheckpointError, match="their tensors have other names and pieces; bring both"):
            diff(*pair)
    assert diff(tmp_path / "original", tmp_path / "original")[0] == []


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
