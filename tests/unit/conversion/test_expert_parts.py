"""Experts that are parts of an MLP, with some of their inner columns drawn anew."""

import pytest
import torch

from megatron_moellava.config import MoEConfig
from megatron_moellava.conversion.expert_parts import Division, moments, redrawn_columns
from megatron_moellava.conversion.megatron_checkpoint import open_checkpoint
from megatron_moellava.conversion.tensors import Tensor, Tile
from megatron_moellava.conversion.upcycle import upcycle_checkpoint
from tests.helpers.conversion_models import read

LAYER = "language_model.decoder.layers.0.mlp."
EXPERTS = f"{LAYER}experts.experts."


def loaded(folder) -> dict[str, torch.Tensor]:
    tensors = open_checkpoint(folder).tensors
    return {name: read(tensor) for name, tensor in tensors.items() if name.startswith(LAYER)}


@pytest.fixture(scope="module")
def wide(dense, tmp_path_factory):
    """(dense tensors of the layer, folder, whether its MLPs are gated, width of an MLP)."""
    folder, _ = dense
    before = loaded(folder)
    inner = before[f"{LAYER}linear_fc2.weight"].shape[1]
    return before, folder, before[f"{LAYER}linear_fc1.weight"].shape[0] == 2 * inner, inner


def made(folder, tmp_path, name: str, inner: int, granularity: int = 1, copies: int = 2, **options):
    moe = MoEConfig(
        num_moe_experts=copies * granularity,
        moe_router_topk=granularity,
        moe_ffn_hidden_size=inner // granularity if granularity > 1 else None,
        placement=(0,),
    )
    upcycle_checkpoint(folder, save=tmp_path / name, moe=moe, **options)
    return loaded(tmp_path / name)


def test_parts_of_a_copy_make_up_the_mlp_and_share_a_router_row(wide, tmp_path):
    before, folder, gated, inner = wide
    whole, parts = made(folder, tmp_path, "whole", inner), made(folder, tmp_path, "parts", inner, granularity=4)
    fc1, fc2 = before[f"{LAYER}linear_fc1.weight"], before[f"{LAYER}linear_fc2.weight"]
    width = inner // 4
    for expert in range(8):
        columns = slice(expert % 4 * width, (expert % 4 + 1) * width)
        rows = torch.cat([matrix[columns] for matrix in fc1.chunk(2 if gated else 1)])
        assert torch.equal(parts[f"{EXPERTS}linear_fc1.weight"][expert], rows)
        assert torch.equal(parts[f"{EXPERTS}linear_fc2.weight"][expert], fc2[:, columns] * 4)
        if f"{LAYER}linear_fc1.bias" in before:
            assert torch.equal(parts[f"{EXPERTS}linear_fc1.bias"][expert], before[f"{LAYER}linear_fc1.bias"][columns])
            assert torch.equal(parts[f"{EXPERTS}linear_fc2.bias"][expert], before[f"{LAYER}linear_fc2.bias"])
    router = parts[f"{LAYER}router.weight"]
    assert torch.equal(router, whole[f"{LAYER}router.weight"].repeat_interleave(4, dim=0))


@pytest.mark.parametrize("granularity", [1, 2])
def test_a_share_of_the_columns_is_drawn_anew_the_same_in_all_matrices(wide, tmp_path, granularity):
    before, folder, gated, inner = wide
    kept = made(folder, tmp_path, "kept", inner, granularity)
    state = made(folder, tmp_path, "moe", inner, granularity, drop=0.25)
    width, count = inner // granularity, inner // granularity // 4
    fc1_of = torch.stack([item[f"{EXPERTS}linear_fc1.weight"] for item in (kept, state)]).float()
    fc2_of = torch.stack([item[f"{EXPERTS}linear_fc2.weight"] for item in (kept, state)]).float()
    seen = []
    for expert in range(2 * granularity):
        new_fc2 = (fc2_of[0, expert] != fc2_of[1, expert]).any(dim=0).nonzero().flatten()
        for matrix in (fc1_of[0, expert] != fc1_of[1, expert]).any(dim=1).chunk(2 if gated else 1):
            assert torch.equal(matrix.nonzero().flatten(), new_fc2)
        assert len(new_fc2) == count
        seen.append(tuple(new_fc2.tolist()))
        drawn = fc2_of[1, expert][:, new_fc2]
        assert drawn.std() == pytest.approx(float(fc2_of[0, expert].std()), rel=0.1)
        gate = fc1_of[1, expert][:width][new_fc2]
        dense = before[f"{LAYER}linear_fc1.weight"][:inner].float()
        assert gate.std() == pytest.approx(float(dense.std()), rel=0.1)
        assert gate.mean() == pytest.approx(float(dense.mean()), abs=4 * float(dense.std()) / gate.numel() ** 0.5)
    assert len(set(seen)) == len(seen), "each expert has columns of its own"
    for name in ("linear_fc1.weight", "linear_fc2.weight"):  # and other values in them
        assert not torch.equal(state[f"{EXPERTS}{name}"][0], state[f"{EXPERTS}{name}"][granularity])
    again = made(folder, tmp_path, "again", inner, granularity, drop=0.25)
    other = made(folder, tmp_path, "other", inner, granularity, drop=0.25, seed=1)
    name = f"{EXPERTS}linear_fc1.weight"
    assert torch.equal(again[name], state[name]) and not torch.equal(other[name], state[name])


def test_biases_of_the_new_columns_are_new(wide, tmp_path):
    before, folder, _, inner = wide
    state = made(folder, tmp_path, "moe", inner, drop=0.5)
    if f"{LAYER}linear_fc1.bias" not in before:
        assert f"{EXPERTS}linear_fc1.bias" not in state
        return
    changed = state[f"{EXPERTS}linear_fc1.bias"] != before[f"{LAYER}linear_fc1.bias"]
    assert changed.sum(dim=1).tolist() == [inner // 2] * 2
    assert torch.equal(state[f"{EXPERTS}linear_fc2.bias"][1], before[f"{LAYER}linear_fc2.bias"])


def test_more_experts_redraw_the_added_ones_alone(wide, tmp_path):
    _, folder, _, _ = wide
    upcycle_checkpoint(folder, save=tmp_path / "two", moe=MoEConfig(num_moe_experts=2, placement=(0,)))
    upcycle_checkpoint(tmp_path / "two", save=tmp_path / "four", moe=MoEConfig(placement=(0,)), drop=0.5)
    two, four = loaded(tmp_path / "two"), loaded(tmp_path / "four")
    for name in ("linear_fc1.weight", "linear_fc2.weight"):
        assert torch.equal(four[f"{EXPERTS}{name}"][:2], two[f"{EXPERTS}{name}"])
        same = four[f"{EXPERTS}{name}"][2:] == two[f"{EXPERTS}{name}"]
        assert 0.4 < same.float().mean() < 0.6


def test_a_tensor_cut_into_other_files_gives_the_same_numbers(tmp_path):
    """A checkpoint saved under tensor parallelism has its fc2 in halves of columns."""
    values = torch.randn(700, 800, generator=torch.Generator().manual_seed(0))
    files = {}
    for name, columns in (("whole", (0, 800)), ("left", (0, 400)), ("right", (400, 800))):
        files[name] = (str(tmp_path / name), columns)
        (tmp_path / name).write_bytes(values[:, columns[0] : columns[1]].contiguous().numpy().tobytes())
    one, two = (
        Tensor((700, 800), "float32", tuple(Tile(files[name][0], 0, (0, 700), files[name][1]) for name in names))
        for names in (("whole",), ("left", "right"))
    )
    assert moments(one, 0, one.numel) == moments(two, 0, two.numel)
    mean, std = moments(one, 0, one.numel)
    assert mean == pytest.approx(float(values.double().mean())) and std == pytest.approx(
        float(values.double().std(correction=0))
    )


def test_columns_are_chosen_by_layer_expert_and_seed():
    division = Division(inner=64, gated=True, granularity=2, drop=0.5, seed=3)
    first = redrawn_columns("layers.0", 0, division)
    assert len(first) == 16 and first.max() < 32 and len(set(first.tolist())) == 16
    others = (("layers.1", 0), ("layers.0", 1))
    assert all(not torch.equal(first, redrawn_columns(*other, division)) for other in others)
