"""Tokens per second of training layouts in 1, 2 and 4 gloo processes on this machine, and a plan's prediction for GPUs.

  python benchmarks/layouts.py

The measured part shows what the axes cost here, where 4 processes share the cores and everything goes through memory: it
says nothing about GPUs. Where tools/plan.py exists, its cost model is asked for 8 to 512 H100s and the answer is stored as
`prediction`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from communication import launch
from measure import finish, median, say

HIDDEN, LAYERS, FFN, SAMPLES = 384, 4, 1056, 16
STEPS = 5  # measured ones, after one that warms up
LAYOUTS: dict[str, tuple[int, dict]] = {  # name: (processes, parallel.*)
    "one process": (1, {}),
    "DP2": (2, {}),
    "DP2, EP2": (2, {"expert_model_parallel_size": 2}),
    "TP2": (2, {"tensor_model_parallel_size": 2}),
    "PP2": (2, {"pipeline_model_parallel_size": 2}),
    "DP4": (4, {}),
    "DP4, EP4": (4, {"expert_model_parallel_size": 4}),
    "DP2 x TP2, EP2": (4, {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2}),
    "TP2 x PP2": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
}
PLAN = Path(__file__).parents[1] / "tools" / "plan.py"
GPUS = (8, 16, 32, 64, 128, 256, 512)
PLANNED = "stablelm-2-1.6b"


def work(names: list[str], out: Path) -> None:
    import torch.distributed as dist
    from synthetic import QUARTER, make_samples, packed_rows, register_model, run_config, trainer_of

    from megatron_moellava import parallel

    register_model("bench", QUARTER, hidden=HIDDEN, layers=LAYERS, ffn=FFN)
    rows = packed_rows(make_samples(SAMPLES, QUARTER), QUARTER)
    rows = rows[: len(rows) // 4 * 4]
    for name in names:
        _, layout = LAYOUTS[name]
        trainer = trainer_of(run_config("bench", QUARTER, len(rows), moe=True, layout=layout), rows)
        speeds = [trainer.step()[0]["tokens_per_second"] for _ in range(STEPS + 1)][1:]
        if dist.get_rank() == 0:
            (out / f"{name}.json").write_text(json.dumps({"tokens per second": median(speeds)}))
    parallel.shutdown()


def prediction() -> dict | None:
    """What the planner says of each number of GPUs; None without a planner. Its JSON is stored as it is."""
    if not PLAN.exists():
        return None
    answers = {}
    for gpus in GPUS:
        command = [sys.executable, str(PLAN), "--backbone", PLANNED, "--gpus", str(gpus), "--gpu", "H100", "--json"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            say(f"tools/plan.py gave no prediction: {done.stderr.strip().splitlines()[-1:]}")
            return None
        answers[str(gpus)] = json.loads(done.stdout)
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.worker, args.out)
        return
    with tempfile.TemporaryDirectory() as folder:
        for processes in (1, 2, 4):
            names = [name for name, (count, _) in LAYOUTS.items() if count == processes]
            launch(__file__, processes, "--out", folder, "--worker", *names)
        measured = {
            name: {"processes": count, **json.loads((Path(folder) / f"{name}.json").read_text())}
            for name, (count, _) in LAYOUTS.items()
        }
    say(str(measured))
    result = {"hidden": HIDDEN, "layers": LAYERS, "ffn": FFN, "experts": 4, "measured": measured}
    predicted = prediction()
    finish(result | ({"prediction": predicted} if predicted else {}))


if __name__ == "__main__":
    main()
