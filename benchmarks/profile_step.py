"""Where the time of the quickstart's stage-3 step goes, spelt out and with `training.compile=true`: shares by kind, and the
largest operations that are no products.

  python -m benchmarks.profile_step [--steps 20] [section.field=value ...]

The quickstart's data, model, rows and configuration on one process, with fresh weights; torch's profiler, self time of
every operation on the training thread. "attention" are fused attention kernels: for short samples attention is spelt out,
and its products count as GEMM, its softmax as softmax. "between operations" is the time of a step in which no torch
operation ran: Python, autograd, megatron-core. The profiler itself adds to it; the unprofiled step stands beside.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.measure import finish, say
from megatron_moellava.training.operation_kinds import by_kind, kind_of

QUICKSTART = Path(__file__).parents[1] / "examples" / "quickstart"


def kinds_of_time(step: Callable[[], object], steps: int) -> dict:
    """Milliseconds of a step by kind, of the GPU's kernels where there is one, else of the operations' own time on the host."""
    from torch.profiler import profile

    from megatron_moellava import platform
    from megatron_moellava.training.profiling import own_times

    platform.synchronize()
    started = time.perf_counter()
    with profile(activities=platform.profiler_activities()) as profiler:
        for _ in range(steps):
            step()
        platform.synchronize()
    whole = 1000 * (time.perf_counter() - started) / steps
    times = {name: value / 1000 / steps for name, value in own_times(profiler)[0].items()}
    kinds = by_kind(times.items())
    largest = sorted(times.items(), key=lambda item: -item[1])[:15]
    return {
        "profiled step": whole,
        "milliseconds": kinds,
        "busy share": sum(kinds.values()) / whole,
        "largest": dict(largest),
    }


def quickstart_trainer(folder: Path, overrides: list[str]):
    sys.path.insert(0, str(QUICKSTART))
    from make_data import write_quickstart

    from megatron_moellava import parallel
    from megatron_moellava.model.precision import settle_and_say
    from megatron_moellava.training.run import build_trainer
    from megatron_moellava.validation.run import load_run, validate_run

    write_quickstart(folder)
    run = load_run(
        config=str(QUICKSTART / "quickstart.yaml"),
        flags={
            "model.backbone": "llama-tiny",
            "moe.num_moe_experts": 4,
            "training.stage": 3,
            "training.train_steps": 1000,
            "data.sources": [{"path": str(folder / "conversations.json"), "image_folder": str(folder / "images")}],
            "data.tokenizer": str(folder / "tokenizer.model"),
            "logging.directory": str(folder / "log"),
        },
        overrides=overrides,
    )
    validate_run(run)
    parallel.initialize(run.parallel, run.training.seed)
    trainer = build_trainer(settle_and_say(run))
    for wrapped in trainer.wrapped:
        wrapped.train()
    return trainer


def shares(profiler, steps: int, plain: float, profiled: float) -> dict:
    """Milliseconds of a step by kind, and the operations behind them."""
    from megatron_moellava.training.profiling import own_times

    times = {name: value / 1000 / steps for name, value in own_times(profiler)[0].items()}
    kinds = by_kind(times.items())
    kinds["between operations"] = max(0.0, 1000 * profiled - sum(kinds.values()))
    others = sorted((item for item in times.items() if kind_of(item[0]) != "GEMM"), key=lambda item: -item[1])
    result = {
        "step milliseconds": 1000 * plain,
        "profiled step milliseconds": 1000 * profiled,
        "share": {name: value / 1000 / profiled for name, value in sorted(kinds.items(), key=lambda item: -item[1])},
        "largest others": {name: value / 1000 / profiled for name, value in others[:12]},
        "calls per step": sum(item.count for item in profiler.key_averages()) / steps,
    }
    say(str(result))
    return result


def measure(steps: int, overrides: list[str]) -> dict:
    """`shares` of that many steps after five others."""
    from torch.profiler import ProfilerActivity, profile

    from megatron_moellava import parallel

    def timed() -> float:
        started = time.perf_counter()
        for _ in range(steps):
            trainer.step()
        return (time.perf_counter() - started) / steps

    with tempfile.TemporaryDirectory() as folder:
        sys.stdout, stdout = sys.stderr, sys.stdout
        trainer = quickstart_trainer(Path(folder), overrides)
        for _ in range(5):
            trainer.step()
        plain = timed()
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            profiled = timed()
        sys.stdout = stdout
        parallel.shutdown()
    return shares(profiler, steps, plain, profiled)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    args = parser.parse_args()
    ways = {"spelt out": "training.compile=false", "compiled": "training.compile=true"}
    finish({name: measure(args.steps, [*args.overrides, way]) for name, way in ways.items()})


if __name__ == "__main__":
    main()
