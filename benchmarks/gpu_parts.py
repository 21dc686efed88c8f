"""The parts of `make test-gpu` and `make bench-gpu`, each a function that returns its result. benchmarks/gpu.py runs them.

Every part starts programs of this repository, so that one that dies takes nothing along. `Place` says on what and how
large: a real GPU at full size, or the tests' pretended GPU at a size that a CPU computes in seconds.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
FP8 = ("tensorwise", "delayed", "blockwise")  # recipes that Hopper computes


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where results lie, what starts a program, and the sizes."""

    out: Path
    prefix: tuple[str, ...] = ()  # before a program: the pretended GPU
    path: tuple[str, ...] = ()  # beside the repository, where Python looks for modules
    engine_prefix: tuple[str, ...] | None = ()  # these two with Transformer Engine; None: it is not there
    engine_path: tuple[str, ...] = ()
    fp8: tuple[str, ...] = FP8
    golden: str = "tests/golden"
    jobs: tuple[str, ...] = ("moved", "packed", "original", "bf16", "megatron answers")
    ceiling: int = 8192  # width of the product that tells the peak
    layers: tuple[tuple[str, int, int, int], ...] = (  # name, hidden, FFN, tokens
        ("stablelm-2-1.6b", 2048, 5632, 16384),
        ("llama-3.1-8b", 4096, 14336, 16384),
    )
    steps: tuple[str, ...] = ("stablelm-2-1.6b", "phi-2")  # backbones
    step_options: tuple[str, ...] = ()
    engine_step: str = "stablelm-2-1.6b"
    generation: tuple[tuple[str, ...], ...] = (  # options of benchmarks.generation
        ("--hidden", "2048", "--layers", "16", "--precision", "fp32", "--batch", "8", "--rounds", "2"),
        ("--hidden", "2048", "--layers", "16", "--precision", "bf16", "--batch", "32", "--rounds", "3"),
    )
    quickstart: tuple[str, ...] = ("--steps-scale", "0.3")

    def start(self, *arguments: str, minutes: float = 10, **variables: str) -> str:
        """The output of one program. Raises RuntimeError with its end where it fails."""
        path = os.pathsep.join([str(REPO), *self.path])
        environment = os.environ | {"PYTHONPATH": path, "TQDM_DISABLE": "1"} | variables
        command = [sys.executable, *self.prefix, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=REPO, env=environment, timeout=60 * minutes)
        if done.returncode:
            raise RuntimeError(f"exit code {done.returncode}: {(done.stdout + done.stderr)[-3000:]}")
        return done.stdout

    def measured(self, *arguments: str, minutes: float = 10, **variables: str) -> dict:
        """What a benchmark prints."""
        output = self.start(*arguments, minutes=minutes, **variables)
        return json.loads(output[output.index("{") :])

    def on_cpu(self, *arguments: str) -> str:
        """The same on this machine's CPU."""
        return Place(out=self.out).start(*arguments, CUDA_VISIBLE_DEVICES="")


# A part that a later one does not need fails alone: each of several models leaves its own error.
def each(names, measure: Callable[[str], dict]) -> dict:
    """{name: what it measured, or {"failed": why}}; RuntimeError where none of them did."""
    found: dict[str, dict] = {}
    for name in names:
        try:
            found[name] = measure(name)
        except Exception as error:
            found[name] = {"failed": f"{type(error).__name__}: {error}"[-3000:]}
    if all("failed" in item for item in found.values()):
        raise RuntimeError(json.dumps(found, indent=1))
    return found


# --- test -------------------------------------------------------------------------------------------------------------


def environment(place: Place) -> dict:
    """(a) What is installed, what the program makes of it, and whether the kernels that it calls do what a CPU does."""
    from benchmarks.run import describe_machine

    machine = describe_machine()
    return {"machine": machine} | place.measured("-m", "benchmarks.gpu_kernels", str(place.ceiling))


def golden(place: Place) -> dict:
    """(b) The recordings of the original on this GPU: fp32 without TF32, local modules."""
    output = place.start("-m", "megatron_moellava", "verify", place.golden, "--device", "cuda")
    return {"tables": [line for line in output.splitlines() if "quantities compared" in line]}


def models(place: Place) -> dict:
    """(b) Loss and every gradient of a model of each kind against the CPU's, in fp32 and bf16, local modules."""
    return against_cpu(place, "models", "local")


def against_cpu(place: Place, folder: str, transformer_impl: str) -> dict:
    out = place.out / folder
    place.on_cpu("-m", "tests.gpu.job", "cpu", str(out / "cpu"), "models")
    choice = {"MOELLAVA_TRANSFORMER_IMPL": transformer_impl}
    place.start("-m", "tests.gpu.job", "real", str(out / "gpu"), "models", **choice)
    result = json.loads((out / "gpu/models.json").read_text())
    if "error" in result:
        raise RuntimeError(result["error"][-3000:])
    return result["cases"]


def checkpoints(place: Place) -> dict:
    """(c) A CPU checkpoint through the GPU and back, bit by bit; training on both; a resumed run on the GPU."""
    folder, jobs = place.out / "checkpoints", place.jobs
    place.on_cpu("-m", "tests.gpu.job", "cpu", str(folder / "cpu"), *jobs)
    local = {"MOELLAVA_TRANSFORMER_IMPL": "local"}
    place.start("-m", "tests.gpu.job", "real", str(folder / "gpu"), *jobs, **local)
    there, here = (
        {job: json.loads((folder / f"{where}/{job}.json").read_text()) for job in jobs} for where in ("gpu", "cpu")
    )
    errors = {job: result["error"] for job, result in there.items() if "error" in result}
    if errors:
        raise RuntimeError(json.dumps(errors, indent=1))
    trained = [job for job in jobs if "steps" in there[job]]
    found: dict[str, object] = {}
    if "moved" in jobs:
        found["bit-equal after CPU, GPU, CPU"] = there["moved"]["digests"] == here["moved"]["digests"]
    for job in trained:
        pairs = zip(there[job]["steps"], here[job]["steps"], strict=True)
        found[f"largest relative difference of a loss from the CPU's, {job}"] = max(
            abs(a[0] - b[0]) / b[0] for a, b in pairs
        )
    found["a resumed run equals the whole one"] = {job: there[job]["steps"] == there[job]["resumed"] for job in trained}
    if "megatron answers" in jobs:
        found["same tokens as on the CPU"] = there["megatron answers"]["tokens"] == here["megatron answers"]["tokens"]
    return found


def quickstart(place: Place) -> dict:
    """(d) The three stages in miniature, on one GPU."""
    out = place.out / "quickstart"
    place.start("examples/quickstart/run.py", "--preset", "fast", "--out", str(out), *place.quickstart, minutes=20)
    return json.loads((out / "summary.json").read_text())


# --- bench ------------------------------------------------------------------------------------------------------------


def moe_layer(place: Place) -> dict:
    """(f) Forward and backward pass of a MoE layer of 4 experts, top-2, beside the dense products that it cannot do without
    and transformers' experts; local modules."""
    sizes = {name: map(str, rest) for name, *rest in place.layers}
    local = {"MOELLAVA_TRANSFORMER_IMPL": "local"}
    return each(sizes, lambda name: place.measured("-m", "benchmarks.gpu_moe_layer", *sizes[name], **local))


def full_size(place: Place) -> dict:
    """(e) Stage-3 steps with random weights, learned routing, packed rows of 4,096 tokens and photographs from files; the
    planner's memory beside the measured one; the device's time by kind. Local modules."""
    return each(place.steps, lambda name: step(place, name, "local"))


def step(place: Place, backbone: str, transformer_impl: str, *settings: str) -> dict:
    program = ("-m", "benchmarks.gpu_step", backbone, *place.step_options, *settings)
    return place.measured(*program, f"training.transformer_impl={transformer_impl}", minutes=15)


def generation(place: Place) -> dict:
    """(g) Tokens per second beside transformers' generate, with the same weights and prompts."""
    options = {" ".join(item): item for item in place.generation}
    return each(options, lambda name: place.measured("-m", "benchmarks.generation", *options[name], minutes=15))


def engine(place: Place) -> dict:
    """(h) With Transformer Engine's modules: each kind of model against the CPU, the MoE layer, the step, FP8 recipes."""
    from megatron_moellava.machine import engine_found

    if place.engine_prefix is None or (not place.engine_prefix and engine_found() != "whole"):
        return {"left out": "Transformer Engine is not installed here"}
    place = replace(place, prefix=place.engine_prefix, path=place.engine_path)
    asked = {"MOELLAVA_TRANSFORMER_IMPL": "transformer_engine"}
    name, *sizes = place.layers[0]
    parts: dict[str, Callable[[], dict]] = {
        "models": lambda: against_cpu(place, "engine", "transformer_engine"),
        f"MoE layer, {name}": lambda: place.measured("-m", "benchmarks.gpu_moe_layer", *map(str, sizes), **asked),
        "step, bf16": lambda: step(place, place.engine_step, "transformer_engine"),
    }
    for recipe in place.fp8:
        setting = f"training.fp8_recipe={recipe}"
        parts[f"step, {recipe}"] = lambda setting=setting: step(place, place.engine_step, "transformer_engine", setting)
    return each(parts, lambda name: parts[name]())


PARTS: dict[str, dict[str, Callable[[Place], dict]]] = {
    "test": {
        "environment": environment,
        "golden": golden,
        "models": models,
        "checkpoints": checkpoints,
        "quickstart": quickstart,
    },
    "bench": {"moe_layer": moe_layer, "full_size": full_size, "generation": generation, "engine": engine},
}
