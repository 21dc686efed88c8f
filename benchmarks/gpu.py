"""What `make test-gpu` and `make bench-gpu` do on a machine with a GPU, part by part, each leaving its result as it ends.

  python -m benchmarks.gpu test      environment, golden folders, checkpoints between CPU and GPU, the quickstart
  python -m benchmarks.gpu bench     the MoE layer beside its bound, then stage-3 steps at full size
  python -m benchmarks.gpu page      docs/measurements/gpu.md from runs/gpu/*.json

A part that fails leaves its error and the next one begins. Without a GPU: one line that says what would be done, exit
code 2. Nothing here needs a network.
"""

import json
import os
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
OUT = REPO / "runs/gpu"
PAGE = REPO / "docs/measurements/gpu.md"
LAYERS = {"stablelm-2-1.6b": (2048, 5632), "llama-3.1-8b": (4096, 14336)}  # hidden, FFN
STEPS = {"stablelm-2-1.6b": 12, "phi-2": 12}


def command(*arguments: str, minutes: float = 10, **variables: str) -> str:
    """The output of one program of this repository. Raises RuntimeError with its end where it fails."""
    environment = os.environ | {"PYTHONPATH": str(REPO), "TQDM_DISABLE": "1"} | variables
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=REPO, env=environment, timeout=60 * minutes
    )
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}: {(done.stdout + done.stderr)[-2000:]}")
    return done.stdout


# --- test -------------------------------------------------------------------------------------------------------------


def environment() -> dict:
    """(a) What is installed, and what the program makes of it."""
    code = "import megatron_moellava.platform as p; print(*p.found(), sep='\\n')"
    from benchmarks.run import describe_machine

    return {"found": command("-c", code).splitlines(), "machine": describe_machine()}


def golden() -> dict:
    """(b) The recordings of the original on this GPU: fp32 without TF32, local modules."""
    output = command("-m", "megatron_moellava", "verify", "tests/golden", "--device", "cuda")
    return {"tables": [line for line in output.splitlines() if "quantities compared" in line]}


def checkpoints() -> dict:
    """(c) A CPU checkpoint through the GPU and back, bit by bit; training on both; a resumed run on the GPU."""
    folder, jobs = OUT / "checkpoints", ("moved", "packed", "original", "megatron answers")
    command("-m", "tests.gpu.job", "cpu", str(folder / "cpu"), *jobs, CUDA_VISIBLE_DEVICES="")
    command("-m", "tests.gpu.job", "real", str(folder / "real"), *jobs)
    there, here = (
        {job: json.loads((folder / f"{where}/{job}.json").read_text()) for job in jobs} for where in ("real", "cpu")
    )
    errors = {job: result["error"] for job, result in there.items() if "error" in result}
    if errors:
        raise RuntimeError(json.dumps(errors, indent=1))
    loss = max(
        abs(a[0] - b[0]) / b[0] for j in jobs[1:3] for a, b in zip(there[j]["steps"], here[j]["steps"], strict=True)
    )
    return {
        "bit-equal after CPU, GPU, CPU": there["moved"] == here["moved"],
        "largest relative difference of a loss, GPU against CPU": loss,
        "a resumed run equals the whole one": all(there[job]["steps"] == there[job]["resumed"] for job in jobs[1:3]),
        "same tokens as on the CPU": there["megatron answers"] == here["megatron answers"],
    }


def quickstart() -> dict:
    """(d) The three stages in miniature, on one GPU."""
    out = OUT / "quickstart"
    command("examples/quickstart/run.py", "--out", str(out), "--steps-scale", "0.3", minutes=20)
    return json.loads((out / "summary.json").read_text())


# --- bench ------------------------------------------------------------------------------------------------------------


def moe_layer() -> dict:
    """(f) Forward and backward pass of a MoE layer of 4 experts, top-2, beside the dense products that it cannot do without."""
    return {
        name: {str(tokens): json.loads(command("-m", "benchmarks.gpu_moe_layer", *map(str, (*sizes, tokens))))}
        for name, sizes in LAYERS.items()
        for tokens in (16384,)
    }


def full_size() -> dict:
    """(e) Stage-3 steps with random weights, learned routing, packed rows of 4,096 tokens, pictures from files."""
    data = OUT / "quickstart/data"
    if not (data / "conversations.json").exists():
        raise RuntimeError("the pictures are the quickstart's: run `make test-gpu` first")
    found = {}
    for backbone, steps in STEPS.items():
        save = OUT / f"full_size/{backbone}"
        settings = {
            "moe.num_moe_experts": 4,
            "moe.placement": "sparse",
            "data.tokenizer": "tests/golden/assets/tok_bpe",
            "data.template": "v1",
            "data.seq_length": 4096,
            "training.train_steps": steps,
            "training.global_batch_size": 4,
            "training.recompute": "full",
            "checkpoint.save_interval": 10**6,
        }
        flags = ["--stage", "3", "--backbone", backbone, "--tower", "clip-vit-large-patch14-336", "--save", str(save)]
        source = ["--data", str(data / "conversations.json"), "--image-folder", str(data / "images")]
        fields = [f"{name}={value}" for name, value in settings.items()]
        command("-m", "megatron_moellava", "train", *flags, *source, *fields, minutes=15)
        records = [json.loads(line) for line in (save / "steps.jsonl").read_text().splitlines()][3:]
        found[backbone] = {
            name: statistics.median(record[name] for record in records)
            for name in ("tokens_per_second", "tflops_per_second", "mfu", "step_seconds", "peak_memory_gib")
            if all(name in record for record in records)
        }
    return found


PARTS: dict[str, dict[str, Callable[[], dict]]] = {
    "test": {"environment": environment, "golden": golden, "checkpoints": checkpoints, "quickstart": quickstart},
    "bench": {"moe_layer": moe_layer, "full_size": full_size},
}


def run(name: str, part: Callable[[], dict]) -> bool:
    """Run one part and write runs/gpu/NAME.json, whatever happens."""
    started, entry = time.perf_counter(), {"part": part.__doc__, "unix_time": int(time.time())}
    try:
        entry["result"] = part()
    except Exception as error:
        entry["error"] = f"{type(error).__name__}: {error}"
        traceback.print_exc()
    entry["seconds"] = round(time.perf_counter() - started, 1)
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / f"{name}.json").write_text(json.dumps(entry, indent=1) + "\n")
    print(f"{name}: {'failed' if 'error' in entry else 'done'} after {entry['seconds']:.0f} s", flush=True)
    return "error" not in entry


def page(results: dict[str, dict]) -> str:
    """docs/measurements/gpu.md of the results that there are."""
    lines = [
        "# On a GPU",
        "",
        "Made by `python -m benchmarks.gpu page` from what `make test-gpu` and `make bench-gpu` leave in `runs/gpu/`.",
        "",
    ]
    if not results:
        lines += ["Nothing has run on a GPU so far.", ""]
    for name, part in {**PARTS["test"], **PARTS["bench"]}.items():
        lines += [f"## {name.replace('_', ' ')}", "", str(part.__doc__), ""]
        entry = results.get(name)
        if entry is None:
            lines += ["not measured yet", ""]
        else:
            shown = entry.get("result", {"failed": entry.get("error", "")})
            lines += ["```json", json.dumps(shown, indent=1), "```", ""]
    return "\n".join(lines)


def write_page() -> None:
    names = [*PARTS["test"], *PARTS["bench"]]
    results = {
        name: json.loads((OUT / f"{name}.json").read_text()) for name in names if (OUT / f"{name}.json").exists()
    }
    PAGE.write_text(page(results))


def main() -> int:
    what = sys.argv[1] if len(sys.argv) == 2 else ""
    if what == "page":
        write_page()
        return 0
    if what not in PARTS:
        print(__doc__, file=sys.stderr)
        return 2
    import torch

    if not torch.cuda.is_available():
        print(
            f"no GPU here: with one this would run {', '.join(PARTS[what])}, and write {OUT.relative_to(REPO)}/*.json"
        )
        return 2
    passed = [run(name, part) for name, part in PARTS[what].items()]
    write_page()
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
