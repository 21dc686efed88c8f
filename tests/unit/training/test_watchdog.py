"""The small parts behind docs/reliability.md: what is said of hung and slow ranks, the log's rewind, threads of a process."""

import json
from pathlib import Path

import pytest
import torch

from megatron_moellava import platform
from megatron_moellava.checkpoint.description import described_model
from megatron_moellava.checkpoint.folders import complete_iterations, newest_checkpoint, require_checkpoint
from megatron_moellava.training.metrics import StepLog, rewind
from megatron_moellava.training.non_finite_report import name_ranks
from megatron_moellava.training.stragglers import Stragglers
from megatron_moellava.training.watchdog import report


def post(waits: bool, note: str = "step 5, reading data", place: str = "read (media.py:40)") -> dict:
    return {"note": note, "place": place, "waits": waits}


def test_rank_that_is_not_in_a_collective_is_the_one():
    text = report([post(True), post(False), post(True)], 600)
    assert "rank 1 holds up the others at step 5, reading data: read (media.py:40)" in text
    assert "ranks 0, 2 wait for others" in text


def test_rank_without_an_answer_is_named():
    text = report([post(True), None], 600)
    assert "rank 1 does not answer" in text and "rank 0 waits for others" in text
    assert "holds up" not in text


def test_many_waiting_ranks_take_one_line():
    text = report([post(False), *[post(True)] * 20], 600)
    assert "ranks 1, 2, 3, 4, 5, 6, 7, 8 and 12 more wait" in text
    assert len(text.splitlines()) == 3


@pytest.fixture
def stragglers(monkeypatch) -> Stragglers:
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 4)
    return Stragglers(10)


def test_slow_rank_is_named_at_the_second_measurement(stragglers):
    seconds = [1.0, 1.1, 1.0, 2.0]
    numbers, message = stragglers._judge(seconds)
    assert message is None and numbers == {"slowest_rank": 3.0, "slowest_rank_ratio": 2.0}
    _, message = stragglers._judge(seconds)
    assert message.startswith("rank 3 is slow: 2.000 s of its own work a step, the median rank has 1.000 s")


def test_hiccups_and_even_ranks_are_not_reported(stragglers):
    for seconds in ([1, 1, 1, 2], [2, 1, 1, 1], [1, 1, 1, 2], [1, 1.1, 1.2, 1.25], [1, 1, 1, 2]):
        assert stragglers._judge(seconds)[1] is None


def test_log_is_rewound_to_the_step_that_a_run_continues_from(tmp_path):
    path = tmp_path / "steps.jsonl"
    lines = [json.dumps({"iteration": step, "time": 100.0 + step}) for step in (1, 2, 3, 4)]
    path.write_text("\n".join(lines) + '\n{"iteration": 5, "ti')  # cut off by a kill
    assert rewind(path, 3) == 103.0
    assert [json.loads(line)["iteration"] for line in path.read_text().splitlines()] == [1, 2, 3]
    assert rewind(path, 0) == 0.0 and path.read_text() == ""
    assert rewind(tmp_path / "none.jsonl", 3) == 0.0


def test_who_began_is_named_and_a_loss_comes_before_gradients():
    ranks = [(0, ["a"], "gradient"), (1, ["b"], "loss"), (2, ["c"], "")]
    assert name_ranks(ranks) == ("the loss of rank 1", "b")
    assert name_ranks([ranks[0], ranks[2]]) == ("the gradient of rank 0", "a")


def test_ranks_of_one_model_name_their_samples_once():
    assert name_ranks([(0, ["a"], "loss"), (1, ["a"], "loss")]) == ("the loss of rank 0, 1", "a")
    assert name_ranks([(0, ["a"], ""), (1, ["a"], ""), (2, ["b"], "")]) == ("the gradient", "a, b")


@pytest.mark.skipif(platform.HAS_CUDA, reason="threads matter on a CPU")
@pytest.mark.parametrize(("variables", "threads"), [({}, [4]), ({"LOCAL_WORLD_SIZE": "2"}, [2])])
def test_processes_share_the_cores(monkeypatch, variables, threads):
    assert _threads(monkeypatch, variables) == threads


@pytest.mark.skipif(platform.HAS_CUDA, reason="threads matter on a CPU")
@pytest.mark.parametrize("variables", [{}, {"LOCAL_WORLD_SIZE": "1"}, {"LOCAL_WORLD_SIZE": "2"}])
def test_number_of_threads_that_the_user_sets_stays(monkeypatch, variables):
    assert _threads(monkeypatch, variables | {"OMP_NUM_THREADS": "3"}) == []


def _threads(monkeypatch, variables: dict[str, str]) -> list[int]:
    """What claim_device sets on four cores."""
    found: list[int] = []
    for name in ("OMP_NUM_THREADS", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 1, 2, 3})
    monkeypatch.setattr(torch, "set_num_threads", found.append)
    platform.claim_device(0)
    return found


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


def test_a_log_that_does_not_fit_at_the_end_takes_no_exit_code_away(tmp_path, monkeypatch, capsys):
    """/dev/full takes what is buffered and refuses it when the file is closed."""
    monkeypatch.setattr("megatron_moellava.parallel.is_main_process", lambda: True)
    log = StepLog(tmp_path, False, "stage 1", 10)
    with Path("/dev/full").open("w") as log.file:
        log.file.write("a record")
        log.close()
    assert "cannot write the log to its end" in capsys.readouterr().out
    assert log.routing_file.closed
