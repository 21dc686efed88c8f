"""A profile of some steps: what lies in the folder afterwards, and that the run is what it is without one."""

import gzip
import json
from dataclasses import replace

import pytest
import torch

from megatron_moellava import parallel, platform
from megatron_moellava.config import ProfileConfig
from megatron_moellava.training.loop import Trainer
from megatron_moellava.training.profiling import PHASES
from tests.helpers.runs import problems
from tests.unit.training.test_loop import Rows, run_in


def profiled(folder, steps, ranks=(0,), **training) -> Trainer:
    run = replace(run_in(folder, **training), profile=ProfileConfig(steps=steps, ranks=ranks))
    platform.seed_everything(1)
    parallel.seed_model_parallel(1)
    return Trainer(run, Rows(), 4)


def test_two_steps_leave_a_trace_by_phase_and_a_summary(world, tmp_path, capsys):
    trainer = profiled(tmp_path / "with", (2, 3))
    assert trainer.train() == 0
    plain = profiled(tmp_path / "without", ())
    assert plain.train() == 0
    for one, other in zip(trainer.chunks[0].parameters(), plain.chunks[0].parameters(), strict=True):
        assert torch.equal(one, other)
    assert not (tmp_path / "without/profile").exists()
    assert trainer.chunks[0].config.timers is None

    names = sorted(path.name for path in (tmp_path / "with/profile").iterdir())
    assert names == ["steps2-3_rank0.json.gz", "steps2-3_rank0.md"]
    with gzip.open(tmp_path / "with/profile/steps2-3_rank0.json.gz") as file:
        events = [event["name"] for event in json.load(file)["traceEvents"] if event.get("cat") == "user_annotation"]
    counts = {phase: events.count(f"phase {phase}") for phase in PHASES}
    assert counts == {"data": 2, "forward": 4, "backward": 4, "optimizer": 2, "save": 1}  # two micro-batches, one save
    assert events.count("megatron all-grads-sync") == 2

    page = (tmp_path / "with/profile/steps2-3_rank0.md").read_text()
    for text in (*(f"| {phase} |" for phase in PHASES), "| GEMM |", "| between operations |", "| `aten::mm` |"):
        assert text in page
    kinds = page.split("| kind | share |")[1].split("| operation")[0]
    shares = [float(line.split("|")[2].strip(" %")) for line in kinds.splitlines() if "%" in line]
    assert sum(shares) == pytest.approx(100, abs=1)
    assert "steps2-3_rank0.md, and the trace" in capsys.readouterr().out


def test_a_run_that_ends_earlier_writes_what_it_has_and_other_ranks_write_nothing(world, tmp_path):
    assert profiled(tmp_path / "short", (4, 9)).train() == 0
    assert (tmp_path / "short/profile/steps4-4_rank0.md").exists()
    assert profiled(tmp_path / "other", (2,), ranks=(1,)).train() == 0
    assert not (tmp_path / "other/profile").exists()
    assert profiled(tmp_path / "all", (2,), ranks=()).train() == 0
    assert (tmp_path / "all/profile/steps2-2_rank0.md").exists()


@pytest.mark.parametrize("fields, message", [
    ({"profile__steps": [3, 2]}, "profile.steps=[3,2] must be the first and the last step"),
    ({"profile__steps": [1, 2, 3]}, "profile.steps=[1,2,3] must be the first and the last step"),
    ({"profile__steps": [0]}, "from 1 on"),
    ({"profile__steps": [2, 9], "training__train_steps": 8}, "profile.steps=[2,9]: the run ends after step 8"),
    ({"profile__steps": [2], "profile__ranks": [0, 2]}, "profile.ranks names 2, and there are ranks 0 to 1"),
    ({"profile__steps": [2]}, "needs a folder to write to; set logging.directory or checkpoint.save"),
])  # fmt: skip
def test_a_profile_that_cannot_be_is_refused(fields, message):
    assert message in problems(2, **fields)
