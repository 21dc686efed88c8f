"""Where a run goes on: at the newest checkpoint, or at the older one that its user has chosen."""

import pytest

from megatron_moellava.checkpoint.description import RunDescription, write_description
from megatron_moellava.checkpoint.folders import TRACKER, iteration_folder, newest_checkpoint, write_tracker
from megatron_moellava.checkpoint.resume_point import newest_described, resume_point
from megatron_moellava.config import CheckpointError


@pytest.fixture
def run(tmp_path):
    for iteration in (2, 4, 6):
        written(tmp_path, iteration)
    write_tracker(tmp_path, 6)
    return tmp_path


def written(folder, iteration: int, ckpt_step: int | None = None) -> None:
    path = iteration_folder(folder, iteration)
    path.mkdir(exist_ok=True)
    config = {"checkpoint": {"ckpt_step": ckpt_step}}
    write_description(path, RunDescription(iteration=iteration, model={}, config=config))


def steps(paths) -> list[int]:
    return [int(path.name.removeprefix("iter_")) for path in paths]


def test_the_newest_is_meant_and_those_before_it_stand_in(run):
    point = resume_point(run)
    assert (steps(point.candidates), point.superseded, point.note) == ([6, 4, 2], [], "")
    (run / TRACKER).unlink()
    assert steps(resume_point(run).candidates) == [6, 4, 2]
    assert resume_point(run / "none").candidates == []


def test_an_older_step_in_the_tracker_file_is_honoured(run):
    (run / TRACKER).write_text("4\n")
    point = resume_point(run)
    assert (steps(point.candidates), steps(point.superseded)) == ([4, 2], [6])
    assert "names step 4: goes on from there; iter_0000006 set aside as *.superseded" in point.note
    assert newest_described(run)[1].iteration == 4
    assert newest_checkpoint(run) == iteration_folder(run, 4), "for those who start from it, too"


@pytest.mark.parametrize("text", ["5", "release", "", "4 6", "²"])
def test_a_tracker_file_that_names_no_checkpoint_is_said_and_passed_over(run, text):
    (run / TRACKER).write_text(text)
    point = resume_point(run)
    assert (steps(point.candidates), point.superseded) == ([6, 4, 2], [])
    assert f"names {text!r}, of which there is no complete checkpoint; the newest is iter_0000006" in point.note
    assert newest_checkpoint(run) == iteration_folder(run, 6)


def test_ckpt_step_goes_back_and_takes_no_other(run):
    point = resume_point(run, 2)
    assert (steps(point.candidates), steps(point.superseded)) == ([2], [6, 4])
    assert "checkpoint.ckpt_step=2: goes on from there; iter_0000004, iter_0000006 set aside" in point.note
    with pytest.raises(CheckpointError, match=r"ckpt_step=3: .* no complete checkpoint .*complete: 2, 4, 6"):
        resume_point(run, 3)
    with pytest.raises(CheckpointError, match="complete: none"):
        resume_point(run / "none", 3)


def test_the_same_command_with_ckpt_step_goes_on_with_what_it_has_made(run):
    """A scheduler gives it again after each interruption; the step itself may have been removed by then."""
    for iteration in (4, 6):
        iteration_folder(run, iteration).rename(run / f"iter_{iteration:07d}.superseded")
    written(run, 3, ckpt_step=2)
    written(run, 5, ckpt_step=2)
    assert steps(resume_point(run, 2).candidates) == [5, 3, 2]
    assert "to go back once more, write 2 into" in resume_point(run, 2).note
    (iteration_folder(run, 2) / "run.json").unlink()
    assert steps(resume_point(run, 2).candidates) == [5, 3]
    written(run, 7)  # of a run without the option: another line again
    written(run, 2)
    assert steps(resume_point(run, 2).candidates) == [2]
