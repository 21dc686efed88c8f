"""Which folders of a run are complete checkpoints, and which one is meant."""

import json

from megatron_moellava.checkpoint.description import described_model
from megatron_moellava.checkpoint.folders import complete_iterations, newest_checkpoint, require_checkpoint


def test_damaged_and_unfinished_folders_are_no_checkpoints(tmp_path):
    """All three may hold a run.json that says it is complete."""
    for name in ("iter_0000002", "iter_0000004.damaged", "iter_0000006.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(
            json.dumps({"format": 1, "iteration": 2, "model": {"backbone": name}})
        )
    assert complete_iterations(tmp_path) == [tmp_path / "iter_0000002"]
    assert described_model(tmp_path) == {"backbone": "iter_0000002"}
    assert newest_checkpoint(tmp_path) == tmp_path / "iter_0000002"
    assert require_checkpoint(tmp_path) == tmp_path / "iter_0000002"
