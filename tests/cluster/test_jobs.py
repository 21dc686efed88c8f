"""The scripts of examples/ on a real two-node SLURM: what users submit, what can go wrong, what the job answers."""

import os
import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from tests.cluster.conftest import REPO, Cluster

TWO_NODES = ("--nodes=2", "--gpus-per-node=1")
LENGTH = 150
STEPS = f"training.train_steps={LENGTH}"


def run_script(cluster: Cluster, name: str, *overrides: str, **variables: str) -> subprocess.CompletedProcess:
    """`bash examples/train_stage1.sh` on the login node."""
    environment = cluster.environment(name, **variables)
    return cluster.slurm.run("bash", "examples/train_stage1.sh", *overrides, cwd=REPO, env=environment, check=False)


def jobs(cluster: Cluster) -> str:
    return cluster.slurm.run("squeue", "--noheader", "--states=all").stdout


def processes(save: Path) -> dict[int, list[str]]:
    """{process id: command line} of all that have to do with the run that writes to `save`."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:  # gone meanwhile
            continue
        if str(save) in words:
            found[int(folder.name)] = words
    return found


def workers(save: Path) -> list[int]:
    """Process ids of the training processes, without the loaders and writers that they have forked."""
    others = ("srun", "launch.py", "--validate-only")
    found = [pid for pid, words in processes(save).items() if not any(word.endswith(others) for word in words)]
    parents = {process.pid: process.info["ppid"] for process in psutil.process_iter(["ppid"])}
    return [pid for pid in found if pid in parents and parents[pid] not in found]


@pytest.fixture(scope="session")
def reference(cluster):
    """An undisturbed stage-1 run on two nodes; the disturbed ones must repeat its losses bit by bit."""
    job = cluster.submit("train_stage1.sh", STEPS, name="reference", options=TWO_NODES)
    state = cluster.slurm.wait_for_job(job, 240)
    assert (state["JobState"], state["ExitCode"], state["Restarts"]) == ("COMPLETED", "0:0", "0"), cluster.log(
        "reference"
    )
    return losses(cluster, cluster.folder / "reference/stage1")


def losses(cluster: Cluster, save: Path) -> list[float]:
    """Losses of steps 1..LENGTH; a step that was trained twice must have given the same loss both times."""
    by_step: dict[int, float] = {}
    for record in cluster.steps(save):
        assert by_step.setdefault(record["iteration"], record["loss"]) == record["loss"]
    assert sorted(by_step) == list(range(1, LENGTH + 1))
    return [by_step[step] for step in sorted(by_step)]


def test_two_nodes_train_to_the_end(cluster, reference):
    assert len(reference) == LENGTH
    assert reference[-1] < reference[0]
    assert "2 nodes (n[1-2]) x 1 processes" in cluster.log("reference")


def test_submitting_again_finds_the_work_done(cluster, reference):
    job = cluster.submit("train_stage1.sh", STEPS, name="reference", options=TWO_NODES)
    assert cluster.slurm.wait_for_job(job, 120)["ExitCode"] == "0:0"
    assert losses(cluster, cluster.folder / "reference/stage1") == reference


def test_preempted_job_saves_requeues_and_continues_bit_by_bit(cluster, reference):
    """A job of a higher partition takes the nodes away; SLURM sends the signal of the #SBATCH line."""
    save = cluster.folder / "preempted/stage1"
    job = cluster.submit("train_stage1.sh", STEPS, name="preempted", options=TWO_NODES)
    cluster.wait_for_step(save, 5)
    urgent = cluster.slurm.run(
        *("sbatch", "--parsable", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null"),
        *("--wrap", "srun sleep 3"),
    ).stdout.strip()
    assert cluster.slurm.wait_for_job(urgent, 120)["ExitCode"] == "0:0"
    state = cluster.slurm.wait_for_job(job, 240)
    log = cluster.log("preempted")
    assert (state["JobState"], state["ExitCode"], state["Restarts"]) == ("COMPLETED", "0:0", "1"), log
    assert "asking for a checkpoint" in log and "Checkpoint written; requeueing" in log, log
    assert losses(cluster, save) == reference


def test_signal_before_the_start_requeues(cluster):
    """Preempted while the run is still being checked: it is back in the queue, and trains when its turn comes."""
    save = cluster.folder / "early/stage1"
    job = cluster.submit("train_stage1.sh", "training.train_steps=2", name="early", options=TWO_NODES)
    checks = lambda: any("--validate-only" in words for words in processes(save).values())  # noqa: E731
    cluster.slurm.wait_until(checks, 60, "the check of the run")
    cluster.slurm.run("scancel", "--batch", "--signal=USR1", job)
    state = cluster.slurm.wait_for_job(job, 240)
    assert (state["JobState"], state["ExitCode"], state["Restarts"]) == ("COMPLETED", "0:0", "1"), cluster.log("early")
    assert "Told to stop before the start; requeueing" in cluster.log("early")
    assert cluster.newest_step(save) == 2


def test_crashed_worker_is_requeued_from_the_newest_checkpoint(cluster, reference):
    save = cluster.folder / "crashed/stage1"
    job = cluster.submit("train_stage1.sh", STEPS, name="crashed", options=TWO_NODES)
    cluster.wait_for_step(save, 5)
    os.kill(workers(save)[0], signal.SIGKILL)
    state = cluster.slurm.wait_for_job(job, 300)
    assert (state["JobState"], state["ExitCode"], state["Restarts"]) == ("COMPLETED", "0:0", "1"), cluster.log(
        "crashed"
    )
    assert "Crashed with exit code 137; requeueing" in cluster.log("crashed")
    assert losses(cluster, save) == reference


def test_crash_without_any_progress_ends_the_job(cluster):
    save = cluster.folder / "hopeless/stage1"
    job = cluster.submit("train_stage1.sh", STEPS, "checkpoint.save_interval=1000", name="hopeless", options=TWO_NODES)
    cluster.slurm.wait_until(lambda: (save / "steps.jsonl").exists(), 120, "first step")
    os.kill(workers(save)[0], signal.SIGKILL)
    state = cluster.slurm.wait_for_job(job, 180)
    assert (state["JobState"], state["ExitCode"], state["Restarts"]) == ("FAILED", "137:0", "0"), cluster.log(
        "hopeless"
    )


def test_job_survives_the_loss_of_a_node(cluster, reference):
    save = cluster.folder / "lost/stage1"
    job = cluster.submit("train_stage1.sh", STEPS, name="lost", options=TWO_NODES)
    cluster.wait_for_step(save, 5)
    cluster.slurm.fail_node("n2")
    cluster.slurm.wait_until(lambda: cluster.slurm.job(job)["JobState"] == "PENDING", 120, "job back in the queue")
    cluster.slurm.wait_until(lambda: "down" in cluster.slurm.node_states(), 60, "n2 is given up")
    cluster.slurm.start_node("n2")
    state = cluster.slurm.wait_for_job(job, 300)
    assert (state["JobState"], state["ExitCode"], state["Restarts"]) == ("COMPLETED", "0:0", "1"), cluster.log("lost")
    assert losses(cluster, save) == reference


@pytest.mark.parametrize(
    ("name", "variables", "options", "says"),
    [
        ("no_data", {"DATA": "/nowhere/rows.json"}, TWO_NODES, "/nowhere/rows.json does not exist"),
        ("no_checkpoint", {"LOAD": "/nowhere/base"}, TWO_NODES, "/nowhere/base"),
        ("no_backbone", {"BACKBONE": "phi-22"}, TWO_NODES, "phi-22"),
        ("three_gpus", {}, ("--nodes=1", "--gpus-per-node=3"), "training.global_batch_size=8 must be a multiple of"),
    ],
)
def test_mistakes_end_a_job_before_any_process_starts(cluster, name, variables, options, says):
    job = cluster.submit("train_stage1.sh", STEPS, name=name, options=options, **variables)
    state = cluster.slurm.wait_for_job(job, 60)
    assert (state["JobState"], state["ExitCode"], state["Restarts"]) == ("FAILED", "2:0", "0"), cluster.log(name)
    assert says in cluster.log(name)
    assert "attempt" not in cluster.log(name)
    assert not (cluster.folder / name).exists()


def test_mistakes_are_found_before_anything_is_submitted(cluster):
    before = jobs(cluster)
    result = run_script(cluster, "login", DATA="/nowhere/rows.json")
    assert result.returncode == 2
    assert "/nowhere/rows.json does not exist" in result.stderr
    assert jobs(cluster) == before


def test_request_that_the_cluster_cannot_serve_is_refused(cluster):
    from tests.cluster.conftest import TINY

    before = jobs(cluster)
    result = run_script(cluster, "login", *TINY, STEPS, "training.global_batch_size=36", NODES="9", GPUS_PER_NODE="2")
    assert result.returncode == 2, result.stdout + result.stderr
    assert "cannot run this request" in result.stderr
    assert jobs(cluster) == before


def test_checked_script_submits_itself(cluster):
    from tests.cluster.conftest import TINY

    arguments = (*TINY, "training.train_steps=2")
    result = run_script(cluster, "submitted", *arguments, NODES="1", GPUS_PER_NODE="2", SBATCH_OUTPUT=os.devnull)
    assert result.returncode == 0, result.stdout + result.stderr
    job = result.stdout.split()[-1]
    assert cluster.slurm.wait_for_job(job, 120)["ExitCode"] == "0:0"
    assert cluster.newest_step(cluster.folder / "submitted/stage1") == 2


def test_job_without_gpus_says_so(cluster):
    job = cluster.submit("train_stage1.sh", name="no_gpus", options=("--nodes=1", "--gpus-per-node=0"))
    assert cluster.slurm.wait_for_job(job, 60)["ExitCode"] == "2:0"
    assert "has no GPUs" in cluster.log("no_gpus")


def test_too_many_non_finite_steps_end_the_job_with_3(cluster):
    poison = ("optimizer.lr=1e30", "optimizer.lr_warmup_fraction=0", "training.non_finite_patience=2")
    job = cluster.submit("train_stage1.sh", STEPS, *poison, name="poison", options=TWO_NODES)
    state = cluster.slurm.wait_for_job(job, 180)
    assert (state["JobState"], state["ExitCode"], state["Restarts"]) == ("FAILED", "3:0", "0"), cluster.log("poison")
