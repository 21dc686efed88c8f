"""Every tensor of a conversion is accounted for."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from megatron_moellava.config import CheckpointError
from megatron_moellava.conversion.imports import import_checkpoint
from megatron_moellava.conversion.recipes import Part, Recipe, check
from megatron_moellava.conversion.tensors import Tensor
from tests.helpers.conversion_models import TOWER, original_config, original_state, write_folder


def recipes_and_tensors():
    tensors = {name: Tensor((2, 3), "float32", make=lambda: torch.zeros(2, 3)) for name in "abc"}
    return [Recipe(name.upper(), (2, 3), "float32", (Part(name, 0, 6),)) for name in "abc"], tensors


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda r, t: t.pop("b"), "b: missing"),
        (lambda r, t: t.update(d=t["a"]), "d .*nothing uses it"),
        (lambda r, t: r.append(Recipe("D", (2, 3), "float32", (Part("a", 0, 6),))), "a: elements .* used twice"),
        (lambda r, t: r.append(r[0]), "A: would be produced twice"),
        (lambda r, t: t.update(a=replace(t["a"], shape=(3, 3))), "a: shape .*3, 3"),
        (lambda r, t: t.update(a=Tensor((2, 3), "float32", ())), "a: 6 of its 6 elements are in no file"),
        (lambda r, t: r.__setitem__(0, Recipe("A", (1, 3), "float32", (Part("a", 0, 3),))), "a: only 3 of 6"),
    ],
)
def test_check_names_what_is_lost_doubled_or_misshapen(spoil, message):
    recipes, tensors = recipes_and_tensors()
    check(recipes, tensors, what="x", expected=dict.fromkeys("abc", (2, 3)))
    spoil(recipes, tensors)
    with pytest.raises(CheckpointError, match=message):
        check(recipes, tensors, what="x", expected=dict.fromkeys("abc", (2, 3)))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ([(0, 1), (1, 3)], ""),
        ([(0, 1)], "a: only 1 of 3 columns are used"),
        ([(0, 1), (2, 3)], "a: columns 1 to 2 are used twice or not at all"),
        ([(1, 3)], "a: columns 0 to 1 are used twice or not at all"),
    ],
)
def test_parts_of_rows_must_make_up_the_rows(columns, message):
    tensors = {"a": Tensor((2, 3), "float32", make=lambda: torch.zeros(2, 3))}
    parts = tuple(Part("a", 0, 2 * (end - first), columns=(first, end)) for first, end in columns)
    recipes = [Recipe("A", (1,), "float32", parts)]
    with pytest.raises(CheckpointError, match=message) if message else nullcontext():
        check(recipes, tensors, what="x", copies=True)


def test_all_problems_of_a_source_are_in_one_error(tmp_path):
    state = original_state("llama", "dense")
    del state["model.layers.1.mlp.up_proj.weight"]
    state["model.layers.9.extra"] = torch.zeros(2)
    state["model.norm.weight"] = torch.zeros(3)
    source = write_folder(tmp_path / "source", state, original_config("llama", "dense"))
    with pytest.raises(CheckpointError) as error:
        import_checkpoint(source, save=tmp_path / "run", tower=str(TOWER))
    for part in ("up_proj.weight: missing", "layers.9.extra", "model.norm.weight: shape [3], expected [128]"):
        assert part in str(error.value)
    assert not (tmp_path / "run").exists()
