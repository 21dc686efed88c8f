"""`profile`: some steps of a run under torch's profiler, as a trace for ui.perfetto.dev and as a summary to read.

    FOLDER/profile/steps10-12_rank0.json.gz    the trace, one per profiled rank; ranges by phase
    FOLDER/profile/steps10-12_rank0.md         where the time went: by phase, by kind of operation, the largest operations
    FOLDER/profile/steps10-12_rank0.pickle     on a GPU: who allocated what, for docs.pytorch.org/memory_viz

Phases are data, forward, backward, optimizer and save; Megatron-Core's schedules say when they compute and communicate
(`config.timers`), so the trace has a range for each of its own as well.
"""

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch
import torch.distributed as dist
from torch.autograd import DeviceType

from megatron_moellava import platform
from megatron_moellava.config import ProfileConfig
from megatron_moellava.model.moe_llava import MoELlava
from megatron_moellava.training.operation_kinds import OTHER, by_kind, kind_of

PHASES = ("data", "forward", "backward", "optimizer", "save")
FOLDER = "profile"
_PHASE_OF_TIMER = {"forward-compute": "forward", "backward-compute": "backward"}
_RANGES = ("phase ", "megatron ")  # how the names of ours begin
_LARGEST = 15  # operations that the summary names


def phase(name: str) -> AbstractContextManager:
    """A range of a trace (and of Nsight Systems, on a GPU); next to nothing where nobody records."""
    return platform.range_of(f"phase {name}")


class _Timers:
    """Where Megatron-Core expects its timers: what it would time becomes a range."""

    def __init__(self) -> None:
        self._ranges: dict[str, _Range] = {}

    def __call__(self, name: str, log_level: int = 0) -> "_Range":
        return self._ranges.setdefault(name, _Range(name))


class _Range:
    def __init__(self, name: str) -> None:
        found = _PHASE_OF_TIMER.get(name)
        self.name = f"phase {found}" if found else f"megatron {name}"
        self.open: list[AbstractContextManager] = []

    def start(self, barrier: bool = False) -> None:
        self.open.append(platform.range_of(self.name))
        self.open[-1].__enter__()

    def stop(self, barrier: bool = False) -> None:
        self.open.pop().__exit__(None, None, None)


class Profiler:
    """Profiles the steps that the run names, on the ranks that it names."""

    def __init__(self, options: ProfileConfig, folder: Path | None, chunks: Sequence[MoELlava]):
        """`folder`: of the run's log; validation has seen to it that there is one."""
        self.first, self.last = (options.steps[0], options.steps[-1]) if options.steps else (0, 0)
        chosen = not options.ranks or dist.get_rank() in options.ranks
        self.active = bool(options.steps) and folder is not None and chosen
        self.folder, self.chunks = folder, chunks
        self.profiler: torch.profiler.profile | None = None
        self.first_seen, self.started = 0, 0.0

    def before(self, iteration: int) -> None:
        """A step is about to begin. A run that goes on in the midst of the steps profiles what is left of them."""
        if not self.active or self.profiler is not None or not self.first <= iteration <= self.last:
            return
        for chunk in self.chunks:
            chunk.config.timers = _Timers()
        platform.record_memory()
        self.profiler = torch.profiler.profile(activities=platform.profiler_activities())
        self.profiler.__enter__()
        platform.synchronize()
        self.first_seen, self.started = iteration, time.perf_counter()

    def after(self, iteration: int) -> str | None:
        """A step has ended, with what was saved after it. A line for the log once the last one has."""
        if self.profiler is None or iteration < self.last:
            return None
        return self.finish(iteration)

    def finish(self, iteration: int) -> str | None:
        """Write what there is; also when the run ends before the last step."""
        if self.profiler is None:
            return None
        platform.synchronize()
        steps = max(iteration - self.first_seen + 1, 1)
        milliseconds = 1000 * (time.perf_counter() - self.started) / steps
        profiler, self.profiler = self.profiler, None
        profiler.__exit__(None, None, None)
        for chunk in self.chunks:
            chunk.config.timers = None
        assert self.folder is not None
        path = self.folder / FOLDER / f"steps{self.first_seen}-{iteration}_rank{dist.get_rank()}"
        path.parent.mkdir(parents=True, exist_ok=True)
        found = summary(profiler, steps, milliseconds)
        path.with_suffix(".md").write_text(page(found, path.name))
        profiler.export_chrome_trace(f"{path}.json.gz")
        platform.save_memory(path.with_suffix(".pickle"))
        shares = ", ".join(f"{name} {share:.0%}" for name, share in list(found["kinds"].items())[:4])
        return (
            f"profile: {milliseconds:.0f} ms a step, {shares}; {path}.md, and the trace for ui.perfetto.dev beside it"
        )


def own_times(profiler: torch.profiler.profile) -> tuple[dict[str, float], bool]:
    """({kernel: microseconds}, True) where there is a GPU, else ({operation: its own time on the host}, False).

    On a GPU every range, NCCL's own among them, would count the kernels in it once more.
    """
    items = profiler.key_averages()
    kernels = [
        (item.key, item.self_device_time_total)
        for item in items
        if item.device_type == DeviceType.CUDA and not item.is_user_annotation
    ]
    on_host = [
        (item.key, item.self_cpu_time_total)
        for item in items
        if not item.key.startswith(_RANGES) and ("::" in item.key or kind_of(item.key) != OTHER)
    ]
    times: dict[str, float] = {}
    for name, value in kernels or on_host:
        times[name] = times.get(name, 0.0) + value
    return times, bool(kernels)


def summary(profiler: torch.profiler.profile, steps: int, milliseconds: float) -> dict:
    """{"milliseconds" of a step, "phases" on the host in ms, "kinds" and "largest" as shares of a step, "on"}.

    Kinds are of the GPU's kernels where there is one, else of the operations' own time on the host; what is missing to the
    whole is between operations: Python, autograd, waiting.
    """
    times, of_kernels = own_times(profiler)
    shares = {name: value / 1000 / steps / milliseconds for name, value in times.items()}
    kinds = by_kind(shares.items())
    kinds["between operations"] = max(0.0, 1.0 - sum(kinds.values()))
    on_the_host = {
        item.key.removeprefix("phase "): item.cpu_time_total / 1000 / steps
        for item in profiler.key_averages()
        if item.key.startswith("phase ") and item.device_type == DeviceType.CPU
    }
    return {
        "milliseconds": milliseconds,
        "on": "the GPU's kernels" if of_kernels else "the host's operations",
        "phases": {name: on_the_host[name] for name in PHASES if name in on_the_host},
        "kinds": dict(sorted(kinds.items(), key=lambda item: -item[1])),
        "largest": dict(sorted(shares.items(), key=lambda item: -item[1])[:_LARGEST]),
    }


def page(found: dict, title: str) -> str:
    """The summary as Markdown."""
    phases = [
        (name, f"{value:,.1f} ms", f"{value / found['milliseconds']:.1%}") for name, value in found["phases"].items()
    ]
    kinds = [(name, f"{share:.1%}") for name, share in found["kinds"].items()]
    largest = [(f"`{name}`", f"{share:.1%}") for name, share in found["largest"].items()]
    return "\n".join(
        [
            f"# {title}\n",
            f"{found['milliseconds']:,.1f} ms a step, the profiler's own cost included. Kinds and operations: {found['on']}.\n",
            _table(("phase, on the host", "a step", "share"), phases),
            _table(("kind", "share"), kinds),
            _table(("operation", "share"), largest),
        ]
    )


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
