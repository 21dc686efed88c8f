"""All stages at once: `bash examples/train_all.sh` and the array of ablations."""

import json

from tests.cluster.conftest import REPO, TINY, Cluster


def train_all(cluster: Cluster, name: str, *overrides: str, **variables: str):
    """`bash examples/train_all.sh` with one CPU process on each of two nodes; returns (result, job ids)."""
    environment = cluster.environment(name, NODES="2", GPUS_PER_NODE="1", **variables)
    del environment["LOAD"]
    rows = str(cluster.folder / "rows.json")
    environment |= {
        "DATA1": rows,
        "DATA2": rows,
        "DATA3": rows,
        "SBATCH_OUTPUT": str(cluster.folder / f"{name}-%j.log"),
    }
    arguments = ("bash", "examples/train_all.sh", *TINY, *overrides)
    result = cluster.slurm.run(*arguments, cwd=REPO, env=environment, check=False)
    return result, [line.split()[1].rstrip(":") for line in result.stdout.splitlines() if line.startswith("job ")]


def states(cluster: Cluster, ids: list[str], seconds: float = 300) -> list[tuple[str, str]]:
    return [
        (state["JobState"], state["ExitCode"]) for state in (cluster.slurm.wait_for_job(job, seconds) for job in ids)
    ]


def logs(cluster: Cluster, name: str) -> str:
    return "\n".join(path.read_text() for path in sorted(cluster.folder.glob(f"{name}-*.log")))


def test_three_stages_run_as_a_chain(cluster):
    result, ids = train_all(cluster, "chain", "training.train_steps=4")
    assert result.returncode == 0 and len(ids) == 6, result.stdout + result.stderr
    assert states(cluster, ids) == [("COMPLETED", "0:0")] * 6, logs(cluster, "chain")
    folder = cluster.folder / "chain"
    for stage, moe in (("stage1", False), ("stage2", False), ("stage3", True)):
        assert cluster.newest_step(folder / stage) == 4
        run = json.loads((folder / stage / "iter_0000004/run.json").read_text())
        assert run["stage"] == int(stage[-1])
        assert bool(run["model"]["moe"]) == moe
    assert (folder / "exported/config.json").exists()
    assert list((folder / "exported").glob("*.safetensors"))


def test_a_finished_chain_does_nothing_twice(cluster):
    """After the test above: every part finds its work done."""
    before = (cluster.folder / "chain/stage3/steps.jsonl").read_text()
    _, ids = train_all(cluster, "chain", "training.train_steps=4")
    assert states(cluster, ids) == [("COMPLETED", "0:0")] * 6, logs(cluster, "chain")
    assert (cluster.folder / "chain/stage3/steps.jsonl").read_text() == before


def test_a_broken_part_cancels_those_after_it(cluster):
    poison = ("optimizer.lr=1e30", "optimizer.lr_warmup_fraction=0", "training.non_finite_patience=2")
    result, ids = train_all(cluster, "broken", "training.train_steps=20", *poison)
    assert result.returncode == 0, result.stdout + result.stderr
    first, second, *rest = states(cluster, ids)
    assert first == ("COMPLETED", "0:0")
    assert second == ("FAILED", "3:0"), logs(cluster, "broken")
    assert {state for state, _ in rest} == {"CANCELLED"}


def test_a_mistake_in_the_last_stage_is_found_before_the_first_is_queued(cluster):
    before = cluster.slurm.run("squeue", "--noheader", "--states=all").stdout
    result, ids = train_all(cluster, "mistaken", "moe.num_moe_experts=4", "parallel.expert_model_parallel_size=3")
    assert result.returncode == 2 and not ids, result.stdout + result.stderr
    assert "parallel.expert_model_parallel_size=3" in result.stderr
    assert cluster.slurm.run("squeue", "--noheader", "--states=all").stdout == before


def test_ablations_upcycle_and_train_side_by_side(cluster):
    """After the chain: tasks 0 (the released models' settings) and 4 (top-1) of the array."""
    options = ("--array=0,4", "--nodes=1", "--gpus-per-node=1")
    stage2 = str(cluster.folder / "chain/stage2")
    job = cluster.submit(
        "ablations.sh", "training.train_steps=3", name="ablation", options=options, STAGE2=stage2, LOAD="", SAVE=""
    )
    assert states(cluster, [f"{job}_0", f"{job}_4"]) == [("COMPLETED", "0:0")] * 2, cluster.log("ablation")
    for name, topk in (("interval", 2), ("top-1", 1)):
        run = cluster.folder / f"ablation/ablations/{name}/stage3/iter_0000003/run.json"
        assert json.loads(run.read_text())["model"]["moe"]["moe_router_topk"] == topk
