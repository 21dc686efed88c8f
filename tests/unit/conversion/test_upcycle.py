"""Upcycling: experts are exact copies, routers are new, placements are where they should be, and experts can grow."""

import math

import pytest
import torch
from safetensors.torch import load_file

from megatron_moellava.config import ConfigError, MoEConfig, ProjectorMoEConfig, TowerMoEConfig
from megatron_moellava.conversion.exports import export_checkpoint
from megatron_moellava.conversion.inspection import inspect
from megatron_moellava.conversion.megatron_checkpoint import open_checkpoint
from megatron_moellava.conversion.upcycle import upcycle_checkpoint
from megatron_moellava.conversion.upcycle_request import request
from megatron_moellava.placement import moe_layers
from tests.helpers.conversion_models import read

EXPERTS = ".mlp.deepspeed_moe.experts.deepspeed_experts."
GATE = ".mlp.deepspeed_moe.gate.wg.weight"


def upcycled(dense, tmp_path, name: str = "moe", **options) -> dict[str, torch.Tensor]:
    """The MoE model in the original's names."""
    moe = options.pop("moe", MoEConfig())
    upcycle_checkpoint(dense, save=tmp_path / name, moe=moe, **options)
    export_checkpoint(tmp_path / name, save=tmp_path / f"{name}_out", layout="original")
    return load_file(tmp_path / f"{name}_out/model.safetensors")


def expert(state, layer: int, number: int) -> dict[str, torch.Tensor]:
    prefix = f"model.layers.{layer}{EXPERTS}{number}."
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


@pytest.mark.parametrize("placement", ["first_half", "second_half", "sparse", "dense", (1, 2)])
def test_experts_are_bit_identical_copies_of_their_own_layer(dense, tmp_path, placement):
    folder, before = dense
    after = upcycled(folder, tmp_path, moe=MoEConfig(placement=placement))
    layers = moe_layers(placement, 4)
    for layer in range(4):
        prefix = f"model.layers.{layer}.mlp."
        mlp = {name.removeprefix(prefix): value for name, value in before.items() if name.startswith(prefix)}
        if layer not in layers:
            assert all(torch.equal(after[prefix + name], value) for name, value in mlp.items())
            continue
        assert not any(prefix + name in after for name in mlp)
        for number in range(4):
            copy = expert(after, layer, number)
            assert copy.keys() == mlp.keys() and all(torch.equal(copy[name], value) for name, value in mlp.items())
    rest = [name for name in before if ".mlp." not in name or "image_tower" in name]
    assert all(torch.equal(before[name], after[name]) for name in rest)


def test_routers_are_torchs_default_in_fp32_and_differ_by_layer_and_seed(dense, tmp_path):
    folder, _ = dense
    one, other = upcycled(folder, tmp_path, "one", seed=1), upcycled(folder, tmp_path, "other", seed=2)
    gate = one[f"model.layers.0{GATE}"]
    bound = 1 / math.sqrt(gate.shape[1])
    assert gate.dtype == torch.float32 and gate.shape[0] == 4
    assert 0.9 * bound < gate.abs().max() <= bound
    assert not torch.equal(gate, one[f"model.layers.2{GATE}"]) and not torch.equal(gate, other[f"model.layers.0{GATE}"])


def test_noise_is_on_the_copies_and_not_on_the_first(dense, tmp_path):
    folder, _ = dense
    state = upcycled(folder, tmp_path, noise_std=0.1)
    for name, value in expert(state, 0, 0).items():
        difference = (expert(state, 0, 1)[name].float() - value.float()).std() / value.float().std()
        assert difference == pytest.approx(0.1, rel=0.15)
        assert not torch.equal(expert(state, 0, 1)[name], expert(state, 0, 2)[name])


def test_residual_moe_keeps_the_mlp_and_draws_a_coefficient(dense, tmp_path):
    folder, before = dense
    after = upcycled(folder, tmp_path, moe=MoEConfig(use_residual=True))
    kept = {name for name in after if name.startswith("model.layers.0.mlp.mlp.")}
    assert kept and all(torch.equal(after[name], before[name.replace(".mlp.mlp.", ".mlp.")]) for name in kept)
    hidden = after["model.embed_tokens.weight"].shape[1]
    coefficient = after["model.layers.0.mlp.coefficient.weight"]
    assert coefficient.shape == (2, hidden) and 0 < coefficient.abs().max() <= hidden**-0.5 * 1.01
    assert 0 < after["model.layers.0.mlp.coefficient.bias"].abs().max() <= hidden**-0.5 * 1.01


def test_twice_the_experts_and_top_k_repeat_experts_and_router_rows(dense, tmp_path):
    """Each expert's weight is then split between its two copies, so the function stays."""
    folder, _ = dense
    upcycle_checkpoint(folder, save=tmp_path / "four", moe=MoEConfig(), noise_std=0.1)
    export_checkpoint(tmp_path / "four", save=tmp_path / "four_out", layout="original")
    four = load_file(tmp_path / "four_out/model.safetensors")
    eight = upcycled(tmp_path / "four", tmp_path, "eight", moe=MoEConfig(num_moe_experts=8, moe_router_topk=4))
    gate = f"model.layers.0{GATE}"
    assert torch.equal(eight[gate], torch.cat([four[gate], four[gate]]))
    for number in range(8):
        for name, value in expert(eight, 2, number).items():
            assert torch.equal(value, expert(four, 2, number % 4)[name])


def test_more_experts_with_the_same_top_k_get_new_router_rows(dense, tmp_path):
    folder, _ = dense
    upcycle_checkpoint(folder, save=tmp_path / "four", moe=MoEConfig())
    export_checkpoint(tmp_path / "four", save=tmp_path / "four_out", layout="original")
    six = upcycled(tmp_path / "four", tmp_path, "six", moe=MoEConfig(num_moe_experts=6))
    gate = f"model.layers.0{GATE}"
    four = load_file(tmp_path / "four_out/model.safetensors")[gate]
    assert torch.equal(six[gate][:4], four) and six[gate].shape[0] == 6
    assert not torch.equal(six[gate][4:], four[:2])


def test_a_moe_checkpoint_keeps_its_layers(dense, tmp_path):
    folder, _ = dense
    upcycle_checkpoint(folder, save=tmp_path / "moe", moe=MoEConfig(placement=(1, 3)))
    asked = request(tmp_path / "moe", num_experts=8, topk=None, placement=None, residual=False)
    assert (asked.placement, asked.moe_router_topk) == ((1, 3), 2)
    for wrong, message in (
        (MoEConfig(placement="sparse"), "placement"),
        (MoEConfig(placement=(1, 3), num_moe_experts=2), "only grow"),
        (MoEConfig(placement=(1, 3), use_residual=True), "use_residual"),
        (MoEConfig(placement=(1, 3), moe_router_topk=9), "moe_router_topk"),
    ):
        with pytest.raises(ConfigError, match=message):
            upcycle_checkpoint(tmp_path / "moe", save=tmp_path / "x", moe=wrong)


def test_router_scale_shrinks_the_new_router_and_nothing_else(dense, tmp_path):
    folder, _ = dense
    full, small, none = (upcycled(folder, tmp_path, f"x{s}", router_scale=s) for s in (1.0, 0.25, 0.0))
    for name, value in full.items():
        if name.endswith(GATE):
            assert torch.allclose(small[name], value / 4)
            assert not none[name].any()
        else:
            assert torch.equal(small[name], value)
    with pytest.raises(ConfigError, match="router_scale=-1"):
        upcycle_checkpoint(folder, save=tmp_path / "wrong", moe=MoEConfig(), router_scale=-1.0)


def vision_tensors(folder) -> dict[str, torch.Tensor]:
    source = open_checkpoint(folder)
    return {
        name: read(tensor)
        for name, tensor in source.tensors.items()
        if name.startswith(("projector.", "vision_tower.decoder"))
    }


def test_experts_of_tower_and_projector_are_bit_identical_copies(dense, tmp_path):
    """Alone, beside those of the language model, and before them: the result is the same."""
    folder, _ = dense
    vision = {"tower_moe": TowerMoEConfig(placement=(1,)), "projector_moe": ProjectorMoEConfig(num_moe_experts=3)}
    before = vision_tensors(folder)
    upcycle_checkpoint(folder, save=tmp_path / "vision", moe=None, **vision)
    upcycle_checkpoint(folder, save=tmp_path / "both", moe=MoEConfig(), noise_std=0.0, **vision)
    upcycle_checkpoint(tmp_path / "vision", save=tmp_path / "after", moe=MoEConfig())
    after = vision_tensors(tmp_path / "vision")
    for name, value in after.items():
        if name.endswith("router.weight"):
            bound = value.shape[1] ** -0.5
            assert value.dtype == torch.float32 and 0.9 * bound < value.abs().max() <= bound
            continue
        copies = value if "experts." in name else [value]
        source = before[name.replace("experts.experts.", "")]
        assert len(copies) == (4 if "tower" in name else 3) or "experts." not in name
        assert all(torch.equal(copy, source) for copy in copies), name
    for other in ("both", "after"):
        others = vision_tensors(tmp_path / other)
        assert others.keys() == after.keys() and all(torch.equal(others[name], after[name]) for name in after)
    assert open_checkpoint(tmp_path / "vision").model.moe is None
    described = open_checkpoint(tmp_path / "after").model
    assert (described.tower_moe, described.projector_moe) == (vision["tower_moe"], vision["projector_moe"])
    assert described.moe == MoEConfig()


def test_noise_and_drop_are_not_the_projectors_but_for_the_noise(dense, tmp_path):
    folder, _ = dense
    upcycle_checkpoint(
        folder, save=tmp_path / "moe", moe=MoEConfig(), drop=0.5, noise_std=0.1, projector_moe=ProjectorMoEConfig()
    )
    first, second, *_ = vision_tensors(tmp_path / "moe")["projector.experts.experts.linear_fc1.weight"].float()
    assert torch.equal(first, vision_tensors(folder)["projector.linear_fc1.weight"].float())
    assert float((second - first).std() / first.std()) == pytest.approx(0.1, rel=0.15)


@pytest.mark.parametrize("layout", ["original", "transformers", "tower", "projector", "gguf"])
def test_layouts_without_such_experts_are_refused(dense, tmp_path, layout):
    folder, _ = dense
    upcycle_checkpoint(folder, save=tmp_path / "moe", moe=None, projector_moe=ProjectorMoEConfig())
    with pytest.raises(ConfigError, match=rf"layout {layout} has no experts in the projector \(projector_moe\)"):
        export_checkpoint(tmp_path / "moe", save=tmp_path / "out", layout=layout)
    export_checkpoint(tmp_path / "moe", save=tmp_path / "text", layout="language-model")
    assert "  projector    4 experts, top-2" in inspect(tmp_path / "moe")
