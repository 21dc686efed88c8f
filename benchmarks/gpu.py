"""What `make test-gpu` and `make bench-gpu` do on a machine with a GPU, part by part, each leaving its result as it ends.

  python -m benchmarks.gpu test [PART ...]      environment, golden folders, models and checkpoints against the CPU, quickstart
  python -m benchmarks.gpu bench [PART ...]     the MoE layer beside its bound, full-size steps, generation, Transformer Engine
  python -m benchmarks.gpu page                 docs/measurements/gpu.md from runs/gpu/*.json
  python -m benchmarks.gpu pretend OUT [PART ...]     the same programs at tiny sizes on the tests' pretended GPU, into OUT

A part that fails leaves its error and the next one begins. Without a GPU: one line that says what would be done, exit
code 2. Nothing here needs a network.
"""

import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from benchmarks.gpu_parts import PARTS, REPO, Place

OUT = REPO / "runs/gpu"
PAGE = REPO / "docs/measurements/gpu.md"
ALL = PARTS["test"] | PARTS["bench"]


def tiny(out: Path) -> Place:
    """The pretended GPU, with Transformer Engine's Python code where `make` has put it."""
    from tests.gpu.engine import IS_THERE, SOURCES

    small = ("data.seq_length=512", "data.num_workers=0", "training.global_batch_size=1")
    tiny_step = ("--tower", "clip-tiny", "--steps", "1", "--samples", "12", *small)
    tiny_model = ("--hidden", "128", "--layers", "2", "--batch", "2", "--new-tokens", "4", "--rounds", "1")
    return Place(
        out=out,
        prefix=("-m", "tests.gpu.pretend"),
        engine_prefix=("-m", "tests.gpu.pretend", "--engine") if IS_THERE else None,
        engine_path=(str(SOURCES),),
        fp8=("tensorwise",),
        golden="tests/golden/llama",
        jobs=("moved", "packed", "megatron answers"),
        ceiling=64,
        layers=(("tiny", 128, 256, 64),),
        steps=("llama-tiny",),
        step_options=tiny_step,
        engine_step="llama-tiny",
        generation=((*tiny_model, "--precision", "fp32"), (*tiny_model, "--precision", "bf16")),
        quickstart=("--steps-scale", "0.002"),
    )


def run(name: str, part: Callable[[Place], dict], place: Place) -> bool:
    """Run one part and write OUT/NAME.json, whatever happens."""
    started, entry = time.perf_counter(), {"part": part.__doc__, "unix_time": int(time.time())}
    try:
        entry["result"] = part(place)
    except Exception as error:
        entry["error"] = f"{type(error).__name__}: {error}"
        traceback.print_exc()
    entry["seconds"] = round(time.perf_counter() - started, 1)
    place.out.mkdir(parents=True, exist_ok=True)
    (place.out / f"{name}.json").write_text(json.dumps(entry, indent=1) + "\n")
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
    for name, part in ALL.items():
        lines += [f"## {name.replace('_', ' ')}", "", " ".join(str(part.__doc__).split()), ""]
        entry = results.get(name)
        if entry is None:
            lines += ["not measured yet", ""]
        else:
            shown = entry.get("result", {"failed": entry.get("error", "")})
            lines += ["```json", json.dumps(shown, indent=1), "```", ""]
    return "\n".join(lines)


def write_page() -> None:
    results = {name: json.loads((OUT / f"{name}.json").read_text()) for name in ALL if (OUT / f"{name}.json").exists()}
    PAGE.write_text(page(results))


def main() -> int:
    what, *names = sys.argv[1:] or [""]
    if what == "page":
        write_page()
        return 0
    if what == "pretend" and names:
        place, names = tiny(Path(names[0]).resolve()), names[1:] or list(ALL)
        passed = [run(name, ALL[name], place) for name in names]
        return 0 if all(passed) else 1
    if what not in PARTS or not set(names) <= PARTS[what].keys():
        print(__doc__, file=sys.stderr)
        return 2
    names = names or list(PARTS[what])
    import torch

    if not torch.cuda.is_available():
        print(f"no GPU here: with one this would run {', '.join(names)}, and write {OUT.relative_to(REPO)}/*.json")
        return 2
    passed = [run(name, PARTS[what][name], Place(out=OUT)) for name in names]
    write_page()
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
