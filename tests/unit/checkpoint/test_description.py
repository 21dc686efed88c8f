"""run.json: what any writer writes is read back, and no bit of it can change unseen."""

import json
from dataclasses import replace

import pytest

from megatron_moellava.checkpoint.description import (
    RunDescription,
    converted,
    described_model,
    read_description,
    write_description,
)
from megatron_moellava.checkpoint.folders import RUN_FILE
from megatron_moellava.checkpoint.integrity import DamagedCheckpoint
from megatron_moellava.config import CheckpointError

DESCRIPTION = RunDescription(
    iteration=7,
    stage=3,
    consumed_samples=56,
    optimizer_steps=6,
    world_size=2,
    data_parallel_size=1,
    model={"backbone": "phi-2", "tower": None, "moe": None, "backbone_fields": {"rotary_base": 10000.0}},
    config={"optimizer": {"lr": 1e-05}},
    provenance={"operation": "training of stage 3"},
    sha256={"ranks/data_00000.pt": "0" * 64},
)


def test_a_description_is_read_back_with_its_seal(tmp_path):
    write_description(tmp_path, DESCRIPTION)
    found = read_description(tmp_path)
    assert found.checksum
    write_description(tmp_path, found)
    assert read_description(tmp_path) == found, "the seal does not seal itself"
    assert [getattr(found, name) for name in ("iteration", "model", "config", "sha256")] == [
        getattr(DESCRIPTION, name) for name in ("iteration", "model", "config", "sha256")
    ]
    assert not list(tmp_path.glob("*.tmp"))


def test_every_flipped_bit_is_seen_or_changes_nothing(tmp_path):
    """The one file that vouches for the others; JSON has a few bits without a meaning (1e-05 or 1E-05)."""
    write_description(tmp_path, DESCRIPTION)
    path = tmp_path / RUN_FILE
    whole, right, harmless = path.read_bytes(), read_description(tmp_path), 0
    for bit in range(8 * len(whole)):
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        try:
            assert read_description(tmp_path) == right
            harmless += 1
        except CheckpointError as error:
            assert str(path) in str(error)
    assert harmless < 8


@pytest.mark.parametrize(
    "missing", ["consumed_samples", "optimizer_steps", "provenance", "stage", "config", "world_size"]
)
def test_older_files_lack_fields(tmp_path, missing):
    content = {"format": 1, "iteration": 0, "stage": 2, "model": {"backbone": "phi-2"}, "config": None}
    content.pop(missing, None)
    (tmp_path / RUN_FILE).write_text(json.dumps(content))
    found = read_description(tmp_path)
    assert found.checksum is None and not found.sha256
    assert described_model(tmp_path) == {"backbone": "phi-2"}


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"format": 2}, CheckpointError, "has format 2, this version reads 1"),
        ({"speed": 3}, DamagedCheckpoint, "unknown fields speed"),
        ({"iteration": "7"}, DamagedCheckpoint, "iteration='7'"),
        ({"model": None}, DamagedCheckpoint, "model=None"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, change, error, says):
    content = {"format": 1, "iteration": 0, "model": {}} | change
    (tmp_path / RUN_FILE).write_text(json.dumps(content))
    with pytest.raises(error, match=says):
        read_description(tmp_path)


@pytest.mark.parametrize("name", ["iteration", "model"])
def test_what_every_version_wrote_must_be_there(tmp_path, name):
    content = {"format": 1, "iteration": 0, "model": {}}
    del content[name]
    (tmp_path / RUN_FILE).write_text(json.dumps(content))
    with pytest.raises(DamagedCheckpoint, match=f"lacks {name}"):
        read_description(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format": 1, '])
def test_what_is_no_json_object_is_damaged(tmp_path, text):
    (tmp_path / RUN_FILE).write_text(text)
    with pytest.raises(DamagedCheckpoint, match=RUN_FILE):
        read_description(tmp_path)


def test_a_missing_file_is_an_incomplete_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="incomplete"):
        read_description(tmp_path)


def test_the_history_of_what_is_made_of_a_run_says_what_the_run_learned_from():
    """Also across a conversion; what the new provenance says itself is not said twice, and places are not said at all."""
    data = {"template": "v1", "sources": [{"path": "/home/me/mix.json"}]}
    earlier = {"operation": "training of stage 2", "hf_config": {"a": 1}, "parent": {"operation": "import"}}
    trained = replace(DESCRIPTION, config={"data": data}, provenance=earlier)
    provenance = converted(trained, "upcycle", source="stage2")
    assert provenance["hf_config"] == {"a": 1} and provenance["trained_with"] == {"data": {"template": "v1"}}
    assert provenance["parent"] == {
        "operation": "training of stage 2",
        "parent": {"operation": "import"},
        "data": ["mix.json"],
        "iteration": 7,
        "consumed_samples": 56,
    }
    again = converted(replace(DESCRIPTION, config=None, provenance=provenance), "grow", source="moe")
    assert again["trained_with"] == provenance["trained_with"] and again["hf_config"] == {"a": 1}
    assert again["parent"] == {"operation": "upcycle", "source": "stage2", "parent": provenance["parent"]}
