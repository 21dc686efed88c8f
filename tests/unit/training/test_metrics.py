"""The log of a run."""

import json
from pathlib import Path

import pytest
import torch

from megatron_moellava.data.batch import Counts
from megatron_moellava.training.metrics import StepLog, imbalance, load_imbalance, rewind


def test_log_is_rewound_to_the_step_that_a_run_continues_from(tmp_path):
    path = tmp_path / "steps.jsonl"
    lines = [json.dumps({"iteration": step, "time": 100.0 + step}) for step in (1, 2, 3, 4)]
    path.write_text("\n".join(lines) + '\n{"iteration": 5, "ti')  # cut off by a kill
    assert rewind(path, 3) == 103.0
    assert [json.loads(line)["iteration"] for line in path.read_text().splitlines()] == [1, 2, 3]
    assert rewind(path, 0) == 0.0 and path.read_text() == ""
    assert rewind(tmp_path / "none.jsonl", 3) == 0.0


def test_a_log_that_does_not_fit_at_the_end_takes_no_exit_code_away(tmp_path, monkeypatch, capsys):
    """/dev/full takes what is buffered and refuses it when the file is closed."""
    monkeypatch.setattr("megatron_moellava.parallel.is_main_process", lambda: True)
    log = StepLog(tmp_path, False, "stage 1", 10)
    with Path("/dev/full").open("w") as log.file:
        log.file.write("a record")
        log.close()
    assert "cannot write the log to its end" in capsys.readouterr().out
    assert log.routing_files["language"].closed


def test_load_of_the_busiest_rank_and_expert():
    load_LE = torch.tensor([[6, 2, 1, 3], [3, 3, 3, 3]])
    report = load_imbalance(load_LE, 2)
    assert report == {
        "routing/imbalance/expert": 2.0,
        "routing/imbalance/rank": pytest.approx(8 / 6),
        "routing/imbalance/rank_mean": pytest.approx((8 / 6 + 1) / 2),
        "routing/imbalance/wait_share": pytest.approx(2 / 14),  # 8 + 6 tokens' time, in which the mean rank has 6 + 6
    }
    assert not any(load_imbalance(torch.zeros(2, 4), 4).values())


def rank(tokens: int, images: int, attended: int) -> Counts:
    return Counts(
        samples=1,
        loss_tokens=1,
        real_tokens=tokens,
        positions=16,
        image_rows=images,
        squared_lengths=1,
        attended=attended,
    )


def test_imbalance_is_the_busiest_rank_over_the_mean():
    found = imbalance([rank(10, 0, 4), rank(10, 6, 12)])
    assert found == {"imbalance/tokens": 1.0, "imbalance/image_tokens": 2.0, "imbalance/attention": 1.5}


def test_no_picture_anywhere_is_even():
    assert imbalance([rank(7, 0, 3)])["imbalance/image_tokens"] == 1.0
