"""Memory and throughput of conversions beside `cp` of the same files, in the same run.

  python -m benchmarks.conversion [--gigabytes 2.5] [--folder DIR]

Writes a synthetic MoE-LLaVA release (bf16, random bytes) as safetensors and as .bin, converts it each way in a
process of its own, and prints peak memory over the checkpoint's bytes, and bytes per second over those of `cp`. All
conversions compute the digests of what they write; export and upcycling first verify what they read, a second pass over
it, and --no-verify shows what that costs. The limits that the project set itself: memory at most 0.35, throughput at
least 0.5. Start-up (Python, torch) is measured apart, and processor time beside wall-clock time.
"""

import argparse
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.measure import finish, say
from megatron_moellava.backbones import get_backbone
from megatron_moellava.config import MoEConfig
from megatron_moellava.conversion.inspection import count_parameters
from megatron_moellava.conversion.layout import ORIGINAL, Entry, entries
from megatron_moellava.conversion.original import original_config
from megatron_moellava.conversion.recipes import Part, Recipe
from megatron_moellava.conversion.tensors import Tensor, Tile
from megatron_moellava.conversion.writers import write_safetensors
from megatron_moellava.costs.shapes import Model
from megatron_moellava.towers import get_tower

ROUNDS = 3
TOOL = Path(__file__).parents[1] / "tools" / "convert.py"


def sized_model(gigabytes: float) -> Model:
    """StableLM-2 with 4 experts in every other layer, and as many layers as the size needs."""
    backbone = get_backbone("stablelm-2-1.6b")
    for layers in range(2, 200, 2):
        model = Model(
            backbone=replace(backbone, name="synthetic", num_layers=layers),
            tower=get_tower("clip-vit-large-patch14-336"),
            moe=MoEConfig(router="original", moe_expert_capacity_factor=1.5),
        )
        counts = count_parameters(model)
        if 2 * (counts.total + counts.tower) >= gigabytes * 1e9:
            return model
    raise SystemExit("--gigabytes is too large")


def release_entries(model: Model) -> list[Entry]:
    """A release holds all layers of the tower, also the one that features do not need."""
    return entries(replace(model, tower=replace(model.tower, feature_layer=-1)), ORIGINAL)


def write_release(folder: Path, model: Model) -> None:
    """The right names and shapes over one file of random bytes, which every tensor begins with."""
    folder.mkdir(parents=True)
    noise = folder.with_name("noise")
    shapes = {
        name: shape for entry in release_entries(model) for name, shape in zip(entry.names, entry.shapes, strict=True)
    }
    with noise.open("wb") as file:
        for _ in range(0, max(2 * math.prod(shape) for shape in shapes.values()) + 1, 1 << 24):
            file.write(os.urandom(1 << 24))
    tensors = {name: _random(shape, noise) for name, shape in shapes.items()}
    recipes = [Recipe(name, t.shape, t.dtype, (Part(name, 0, t.numel),)) for name, t in tensors.items()]
    write_safetensors(folder, recipes, tensors, lambda count: None)
    (folder / "config.json").write_text(json.dumps(original_config(model, {}, {})))


def _random(shape: tuple[int, ...], noise: Path) -> Tensor:
    tensor = Tensor(shape, "bfloat16")
    tile = Tile(str(noise), 0, (0, tensor.numel // tensor.columns), (0, tensor.columns))
    return replace(tensor, tiles=(tile,))


def write_bin(folder: Path, release: Path) -> None:
    """The same tensors as pytorch_model.bin."""
    folder.mkdir()
    shutil.copy(release / "config.json", folder)
    script = (
        "import sys, torch; from pathlib import Path; from safetensors.torch import load_file\n"
        "state = {k: v for f in Path(sys.argv[1]).glob('*.safetensors') for k, v in load_file(f).items()}\n"
        "torch.save(state, sys.argv[2])\n"
    )
    subprocess.run([sys.executable, "-c", script, str(release), str(folder / "pytorch_model.bin")], check=True)


def folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one process: wall-clock seconds, processor seconds (which other work on the machine disturbs less), memory."""

    wall: float
    processor: float
    peak_bytes: int = 0


def run(command: list, **options) -> tuple[Cost, str]:
    """What a command costs, and its output."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, **options)
    wall, after = time.monotonic() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Cost(wall, processor), done.stdout


def copied(source: Path) -> Cost:
    target = source.with_name("copy")
    cost, _ = run(["cp", "-r", source, target])
    shutil.rmtree(target)
    return cost


def converted(*arguments: object) -> Cost:
    """One run of tools/convert.py."""
    script = (
        "import sys, resource, runpy\n"
        f"sys.argv = {['convert.py', *map(str, arguments)]!r}\n"
        "try:\n"
        f"    runpy.run_path({str(TOOL)!r}, run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    assert end.code == 0, end.code\n"
        "print('PEAK', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    cost, output = run([sys.executable, "-c", script])
    return replace(cost, peak_bytes=int(output.split("PEAK")[1]) * 1024)


def started_up() -> Cost:
    """Starting Python and importing torch, which costs the same whatever the size."""
    return run([sys.executable, "-c", "import torch, torch.distributed.checkpoint"])[0]


def hashed(source: Path) -> Cost:
    """`sha256sum` of all files, one after another: what digests cost by themselves."""
    return run(["sha256sum", *sorted(path for path in source.rglob("*") if path.is_file())])[0]


def measure(name: str, source: Path, target: Path, *arguments: object) -> dict:
    """Convert `source` into `target`, beside `cp` of it, both ROUNDS times: bytes per second relative to cp's, fastest rounds.

    A virtual machine gives freed memory back to its host after a second or two, and has to fetch it again to write. The
    conversion starts that long after the last deletion, so `cp` waits as long.
    """
    size, costs = folder_bytes(source), {"start-up": [], "cp": [], "sha256sum": [], "command": []}
    for _ in range(ROUNDS):
        costs["start-up"].append(started_up())
        costs["cp"].append(copied(source))
        costs["sha256sum"].append(hashed(source))
        costs["command"].append(converted(*arguments, "--save", target))
        shutil.rmtree(target)
    row: dict = {"name": name, "gigabytes": size / 1e9}
    for unit in ("wall", "processor"):
        fastest = {what: min(getattr(cost, unit) for cost in rounds) for what, rounds in costs.items()}
        relative = fastest["cp"] / max(fastest["command"] - fastest["start-up"], 1e-3)
        row[unit] = fastest | {"times cp": relative}
        say(f"{name}, {unit}: {', '.join(f'{k} {v:.2f} s' for k, v in fastest.items())}, copying {relative:.2f} x cp")
    row["peak megabytes"] = max(cost.peak_bytes for cost in costs["command"]) / 1e6
    row["memory over size"] = row["peak megabytes"] * 1e6 / size
    say(f"  memory {row['peak megabytes']:.0f} MB = {row['memory over size']:.2f} x")
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.5)
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    parsed = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=parsed.folder) as name:
        work = Path(name)
        release, pickled, run = work / "release", work / "pickled", work / "run"
        write_release(release, sized_model(parsed.gigabytes))
        write_bin(pickled, release)
        converted("import", release, "--save", run)
        export, upcycle = ("export", run, "--layout", "original"), ("upcycle", run, "--num-experts", 8)
        jobs = (
            ("import, safetensors", release, ("import", release)),
            ("import, `.bin`", pickled, ("import", pickled)),
            (
                "import with `--dtype float16` (every number is rounded)",
                release,
                ("import", release, "--dtype", "float16"),
            ),
            ("export to MoE-LLaVA's layout", run, export),
            ("the same with `--no-verify`", run, (*export, "--no-verify")),
            ("8 experts from 4 (writes 1.3 times what it reads)", run, upcycle),
            ("the same with `--no-verify`", run, (*upcycle, "--no-verify")),
        )
        finish({"rows": [measure(name, source, work / "out", *command) for name, source, command in jobs]})


if __name__ == "__main__":
    main()
