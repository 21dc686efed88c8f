"""Digests for a checkpoint of an older version, and none for one that is damaged."""

import json
import shutil
from pathlib import Path

import pytest

from megatron_moellava.checkpoint.description import read_description
from megatron_moellava.checkpoint.folders import RUN_FILE
from megatron_moellava.checkpoint.integrity import DamagedCheckpoint
from megatron_moellava.checkpoint.verification import verify_checkpoint
from megatron_moellava.config import CheckpointError
from megatron_moellava.conversion.seal import seal_checkpoint
from tests.helpers.damage import TORN, flip, forget_digests, largest


@pytest.fixture
def iteration(imported, tmp_path) -> Path:
    return Path(shutil.copytree(imported, tmp_path / "run")) / "iter_0000000"


def test_an_older_checkpoint_is_vouched_for_from_now_on(iteration):
    whole = read_description(iteration)
    forget_digests(iteration)
    notes: list[str] = []
    verify_checkpoint(iteration, say=notes.append)
    assert len(notes) == 1 and "older version" in notes[0]
    assert "nobody can tell" in seal_checkpoint(iteration.parent)
    assert read_description(iteration) == whole, "and is what the converter writes today"
    flip(largest(iteration), 5000)
    with pytest.raises(DamagedCheckpoint, match=largest(iteration).name):
        verify_checkpoint(iteration)


def test_digests_that_fit_stay_and_a_lacking_seal_is_added(iteration):
    whole = (iteration / RUN_FILE).read_bytes()
    assert "already" in seal_checkpoint(iteration)
    assert (iteration / RUN_FILE).read_bytes() == whole
    description = json.loads(whole)
    del description["checksum"]
    (iteration / RUN_FILE).write_text(json.dumps(description))
    seal_checkpoint(iteration)
    assert (iteration / RUN_FILE).read_bytes() == whole


def test_digests_that_do_not_fit_are_not_replaced(iteration):
    flip(largest(iteration), 5000)
    before = (iteration / RUN_FILE).read_bytes()
    with pytest.raises(DamagedCheckpoint, match=largest(iteration).name):
        seal_checkpoint(iteration)
    assert (iteration / RUN_FILE).read_bytes() == before


@pytest.mark.parametrize("damage", TORN.values(), ids=TORN)
def test_what_cannot_be_read_is_not_vouched_for(damage, iteration):
    forget_digests(iteration)
    damage(iteration)
    with pytest.raises(CheckpointError):
        seal_checkpoint(iteration)
