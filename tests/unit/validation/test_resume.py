"""What a run may change when it goes on: every field of the table, with a value that differs from the saved one."""

import typing
from collections import Counter
from types import NoneType, UnionType

import pytest

from megatron_moellava.backbones import get_backbone
from megatron_moellava.config import RunConfig, from_dict, set_override, to_dict
from megatron_moellava.validation.resume import (
    CONTENT,
    FREE,
    NOTED,
    REFUSED,
    differences,
    fields_of_a_run,
    refusal,
)
from tests.helpers.runs import tiny

BACKBONE = get_backbone("llama-tiny")
HINTS = {
    f"{section}.{name}": hint
    for section, kind in typing.get_type_hints(RunConfig).items()
    for name, hint in typing.get_type_hints(
        next(part for part in (typing.get_args(kind) or (kind,)) if part is not NoneType)
    ).items()
}
# Where a type alone does not give a value that takes effect.
OTHER = {
    "training.trains": ["router"],
    "training.lora": {"rank": 4},
    "training.distillation": {"teacher_logits": "elsewhere"},
    "moe.expert_groups": {"image": 2, "text": 2},
    "data.template": "plain",
    "data.seq_length": 64,
    "data.max_sample_length": 32,
    "data.ignore_keys": ["system"],
    "validation.sources": [{"path": "elsewhere"}],
    "optimizer.projector_lr": 0.5,
    "data.modalities": [{"name": "depth", "levels": "uint16"}],
    "training.debug": {"detect_anomaly": True},
    "logging.trackers": ["mlflow"],
    "profile.steps": [3],
    "profile.ranks": [1],
    "optimizer.roles": {"experts": {"lr": 0.5}},
}
# How values are shown that were unset, or are lists.
EFFECTIVE = {
    "training.trains": ("experts,language.ffn,projector,router", "router"),
    "data.template": ("v1", "plain"),
    "moe.expert_groups": ("none", "image=2 text=2 shared=0 order=binned"),
    "training.lora": ("none", "rank=4 alpha=32.0 dropout=0.0 use_rslora=False shared_outer=False"),
    "data.max_sample_length": (128, 32),
    "data.modalities": (
        "",
        "name=depth levels=uint16 formats= scale=1.0 offset=0.0 missing= missing_shown=0 channels=",
    ),
}


def other_value(hint, value):
    """A legal value that is not `value`."""
    parts = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, UnionType) else (hint,)
    kind = next(part for part in parts if part is not NoneType)
    if typing.get_origin(kind) is typing.Literal:
        return next(choice for choice in typing.get_args(kind) if choice != value)
    if kind is bool:
        return not value
    return kind(value or 0) + 1 if kind in (int, float) else "elsewhere"


def saved_and_now(*paths: str) -> tuple[dict, RunConfig]:
    """A saved run, and one that differs from it in these fields."""
    vision = [name for name in ("tower_moe", "projector_moe") if any(path.startswith(name) for path in paths)]
    saved, now = (to_dict(tiny(**{name: {} for name in vision})) for _ in range(2))
    for path in paths:
        section, name = path.split(".")
        set_override(now, path, OTHER.get(path) or other_value(HINTS[path], saved[section][name]))
    return saved, from_dict(RunConfig, now)


def test_every_field_of_a_run_stands_in_the_table_once():
    assert Counter([*FREE, *NOTED, *REFUSED, *CONTENT]) == Counter([*fields_of_a_run()])
    assert fields_of_a_run().keys() == HINTS.keys()


@pytest.mark.parametrize("path", REFUSED)
def test_a_field_that_makes_another_run_is_refused_with_both_values(path):
    saved, run = saved_and_now(path)
    said = refusal("checkpoint.save=here", differences(saved, run, BACKBONE).refused)
    section, name = path.split(".")
    then, now = saved[section][name], getattr(getattr(run, section), name)
    then, now = EFFECTIVE.get(path, ("none" if then is None else then, now))
    assert f"{path}={then} then, {now} now" in said
    assert "another checkpoint.save" in said


@pytest.mark.parametrize("path", NOTED)
def test_a_field_that_changes_the_numbers_is_noted_with_both_values(path):
    saved, run = saved_and_now(path)
    noted = differences(saved, run, BACKBONE).noted
    assert [text.partition("=")[0] for text in noted if "projector_lr" not in text or path in text] == [path]
    assert all(" then, " in text and " now" in text for text in noted)


def test_all_that_is_free_is_free_at_once():
    saved, run = saved_and_now(*FREE)
    assert run != tiny()
    assert differences(saved, run, BACKBONE) == differences(saved, tiny(), BACKBONE)
    assert not differences(saved, run, BACKBONE).refused + differences(saved, run, BACKBONE).noted


def test_all_that_is_refused_is_named_at_once():
    saved, run = saved_and_now("training.seed", "moe.moe_router_topk", "data.sampler", "optimizer.lr")
    said = refusal("checkpoint.save=here", differences(saved, run, BACKBONE).refused)
    for text in ("moe.moe_router_topk=2 then, 3 now", "training.seed=42 then, 43 now", "data.sampler=shuffle then,"):
        assert text in said
    assert "optimizer.lr" not in said


@pytest.mark.parametrize("fields", [
    {"data.template": BACKBONE.template},
    {"training.trains": ["router", "experts", "language.ffn", "projector"]},
    {"data.max_sample_length": 128},
    {"data.max_sample_length": 4096},
    {"optimizer.projector_lr": 2e-5},
])  # fmt: skip
def test_an_unset_field_equals_its_default_spelled_out(fields):
    found = differences(to_dict(tiny()), tiny(**fields), BACKBONE)
    assert found.refused == found.noted == []


def test_a_buffer_that_packs_nothing_is_free():
    saved = to_dict(tiny(data__packing=False))
    assert not differences(saved, tiny(data__packing=False, data__packing_buffer=7), BACKBONE).refused
    assert differences(to_dict(tiny()), tiny(data__packing_buffer=7), BACKBONE).refused


def test_a_field_that_an_older_version_lacked_had_its_default():
    saved = to_dict(tiny())
    del saved["data"]["length_counts"], saved["optimizer"]["projector_lr"]
    assert differences(saved, tiny(), BACKBONE) == differences(to_dict(tiny()), tiny(), BACKBONE)
    (refused,) = differences(saved, tiny(data__length_counts="text"), BACKBONE).refused
    assert refused == "data.length_counts=positions then, text now"


def test_a_run_of_before_there_were_modalities_goes_on():
    saved = to_dict(tiny())
    del saved["data"]["modalities"], saved["data"]["ignore_keys"]
    assert differences(saved, tiny(), BACKBONE) == differences(to_dict(tiny()), tiny(), BACKBONE)


def test_towers_of_modalities_are_compared_by_what_they_are_and_not_by_name():
    """A checkpoint brings them along, as a path that is another one with every step."""
    record = {"name": "depth", "levels": "uint16", "projector": "own"}
    then, now = (
        tiny(data__modalities=[{**record, "tower": f"runs/a/iter_00000{step}"}], training__stage=1) for step in (10, 20)
    )
    assert differences(to_dict(then), now, BACKBONE).refused == []
