"""Run benchmarks one after another and write benchmarks/results.json, then docs/measurements/performance.md and its pictures.

  python -m benchmarks.run [moe_layer train_step ...]     default: all of TABLE

Each benchmark is a program of its own that prints progress on stderr and one JSON object on stdout. What was not run
keeps its former results. `make bench` makes the environment first.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
RESULTS = HERE / "results.json"
EINSUM = Path(sys.prefix) / "deepspeed-einsum"  # put there by environment.sh
# name: arguments of benchmarks.NAME. Order is that of docs/measurements/performance.md.
TABLE: dict[str, tuple[str, ...]] = {
    "moe_layer": ("--deepspeed", str(EINSUM)),
    "recorded_routes": (),
    "train_step": ("--deepspeed", str(EINSUM)),
    "profile_step": (),
    "quickstart": (),
    "communication": (),
    "layouts": (),
    "generation": (),
    "compiled_kernels": (),
    "data": (),
    "conversion": (),
}
PACKAGES = ("torch", "megatron-core", "megatron-energon", "transformers", "deepspeed")


def describe_machine() -> dict:
    """What the figures depend on beside the code."""
    cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    lines = dict(line.split(":", 1) for line in cpu.splitlines() if ":" in line)
    fields = {name.strip(): value.strip() for name, value in lines.items()}
    flags = fields.get("flags", "").split()
    installed = {item.metadata["Name"].lower(): item.version for item in importlib.metadata.distributions()}
    return {
        "cpu": fields.get("model name", platform.processor()),
        "family, model": f"{fields.get('cpu family')}, {fields.get('model')}",
        "bf16 units": [flag for flag in ("avx512_bf16", "amx_bf16") if flag in flags],
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        **{name: installed[name] for name in PACKAGES if name in installed},
    }


def run(name: str, arguments: tuple[str, ...]) -> dict:
    """One benchmark's entry. Raises CalledProcessError when it fails."""
    command = [sys.executable, "-m", f"benchmarks.{name}", *arguments]
    cores = str(len(os.sched_getaffinity(0)))
    variables = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", cores), "TQDM_DISABLE": "1"}
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
    started = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=variables, cwd=HERE.parent)
    shown = ["python", "-m", f"benchmarks.{name}", *(part.replace(sys.prefix, ".bench-venv") for part in arguments)]
    return {
        "command": " ".join(shown),
        "seconds": round(time.perf_counter() - started),
        "machine": describe_machine(),
        "results": json.loads(done.stdout[done.stdout.index("{") :]),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=TABLE, help=f"default: {' '.join(TABLE)}")
    names = parser.parse_args().names or list(TABLE)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"benchmarks": {}}
    failed = []
    for name in names:
        print(f"=== {name}", file=sys.stderr, flush=True)
        try:
            entry = run(name, TABLE[name])
        except subprocess.CalledProcessError as error:
            print(f"{name} failed with exit code {error.returncode}", file=sys.stderr)
            failed.append(name)
            continue
        results["benchmarks"] = {key: {**results["benchmarks"], name: entry}.get(key) for key in TABLE}
        results["benchmarks"] = {key: value for key, value in results["benchmarks"].items() if value}
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    subprocess.run([sys.executable, "-m", "benchmarks.report"], check=True, cwd=HERE.parent)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
