"""What a step reports: one line on the screen, one JSON line, TensorBoard; and the routers' state in `routing.jsonl`."""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

import torch
import torch.distributed as dist
from torch.utils.tensorboard import SummaryWriter

from megatron_moellava import parallel, platform
from megatron_moellava.config import Component, LoggingConfig
from megatron_moellava.data.batch import Counts
from megatron_moellava.data.loader import summary
from megatron_moellava.model.moe_llava import MoELlava
from megatron_moellava.routing.health import RoutingHealthMonitor
from megatron_moellava.routing.observer import RoutingObserver, layer_freq
from megatron_moellava.training.held_out import Score
from megatron_moellava.training.max_activations import scalars
from megatron_moellava.training.trackers import Trackers

# What the ranks of a step should have equally much of, and which of the batches' counts says it.
COSTS = {"tokens": "real_tokens", "image_tokens": "image_rows", "attention": "attended"}
ROUTING_LOGS: dict[Component, str] = {  # in the folder of the log, by the part of the model whose routers they are of
    "language": "routing.jsonl",
    "tower": "routing_tower.jsonl",
    "projector": "routing_projector.jsonl",
}
LAYER_NUMBERS = ("max_load", "balance", "load_balancing_loss", "z_loss")


class StepLog:
    """Writes each step's numbers to the terminal, to `steps.jsonl` and to TensorBoard; on the main process only.

    What the routers do goes to `routing.jsonl` (moellava watch follows it) and TensorBoard, and warnings about it
    to the terminal.

    A run that continues from step n drops what an earlier attempt wrote about later steps: the log tells the life of the
    model, each step once. Times are those of a clock that never goes back, whatever is done to the system's.
    """

    def __init__(self, folder: Path | None, tensorboard: bool, title: str, train_steps: int, iteration: int = 0):
        self.active = parallel.is_main_process()
        self.title, self.train_steps = title, train_steps
        self.file: TextIO | None = None
        self.routing_files: dict[str, TextIO] = {}  # by the part of the model
        self.validation_file: TextIO | None = None
        self.activations_file: TextIO | None = None
        self.writer: SummaryWriter | None = None
        self.trackers: Trackers | None = None
        self.routing_health = {component: RoutingHealthMonitor(component) for component in ROUTING_LOGS}
        self.clock = time.time() - time.monotonic()  # what must be added to the latter
        self.folder = folder
        if self.active and folder is not None:
            try:
                self._open(folder, tensorboard, iteration)
            except OSError as error:
                self._without(error)
        self.first_iteration: int | None = None
        self.started = time.monotonic()
        self.waited, self.seconds = 0.0, 0.0  # for data and in all, without the first step
        self.imbalances: dict[str, list[float]] = {}

    def _open(self, folder: Path, tensorboard: bool, iteration: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        steps, validation = (folder / f"{name}.jsonl" for name in ("steps", "validation"))
        last = rewind(steps, iteration)
        rewind(validation, iteration)
        self.activations_path = folder / "activations.jsonl"
        rewind(self.activations_path, iteration)
        for name in ROUTING_LOGS.values():
            rewind(folder / name, iteration)
        self.clock = max(time.time(), last) - time.monotonic()
        purge = iteration + 1 if iteration else None
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=purge) if tensorboard else None
        self.file = steps.open("a", buffering=1)
        self._routing_file("language")  # there in every run, so that whoever follows it finds it
        self.validation_file = validation.open("a", buffering=1)

    def _without(self, error: OSError) -> None:
        """A log is not worth a run; a disk that stays full will end it at the next checkpoint, with a clear message."""
        self.file = self.validation_file = self.activations_file = self.writer = self.folder = None
        self.routing_files = {}
        self.say(f"cannot write the log ({error}); training goes on without it")

    def step(self, iteration: int, numbers: dict[str, float], show: bool, sample_ids: list[str] | None = None) -> None:
        """Numbers of one finished optimizer step."""
        if not self.active:
            return
        self._add_up(numbers)
        try:
            self._write(iteration, numbers, {"sample_ids": sample_ids} if sample_ids is not None else {})
        except OSError as error:
            self._without(error)
        if show:
            print(
                f"{self.title} step {iteration}/{self.train_steps} | {_line(numbers)} | {self._left(iteration)}",
                flush=True,
            )

    def validation(self, iteration: int, scores: list[Score], note: str) -> None:
        """What held-out data say after a step."""
        if not self.active:
            return
        parts = [
            f"{score.name} loss {score.loss:.4f}"
            + (
                f", {score.right / score.short_answers:.1%} of {score.short_answers:,} short answers"
                if score.short_answers
                else ""
            )
            for score in scores
        ]
        print(f"{self.title} step {iteration}/{self.train_steps} validation | {' | '.join(parts)}{note}", flush=True)
        try:
            self._write_validation(iteration, scores)
        except OSError as error:
            self._without(error)

    def _write_validation(self, iteration: int, scores: list[Score]) -> None:
        if not self.validation_file:
            return
        now = round(self.clock + time.monotonic(), 3)
        for score in scores:
            numbers = score.numbers()
            record = {"iteration": iteration, "time": now, "source": score.name, **numbers}
            self.validation_file.write(json.dumps(record) + "\n")
            self._add_scalars(iteration, {f"validation/{score.name}/{name}": value for name, value in numbers.items()})

    def routing(self, iteration: int, record: dict, component: Component = "language") -> None:
        """What the routers of a part of the model did in one step (`routing.records.routing_record`)."""
        if not self.active:
            return
        warnings = self.routing_health[component](record)
        for warning in warnings:
            self.say(f"step {iteration} warning: {prefix_of(component).replace('/', ', ')}{warning}")
        try:
            self._write_routing(iteration, record, warnings, component)
        except OSError as error:
            self._without(error)

    def activations(self, iteration: int, record: dict) -> None:
        """Each layer's largest activations and gradients in one step (`max_activations.py`), to `activations.jsonl`, which
        only runs that record them have."""
        if not self.active or not self.file:
            return
        try:
            if self.activations_file is None:
                self.activations_file = self.activations_path.open("a", buffering=1)
            self.activations_file.write(json.dumps({"iteration": iteration, **record}) + "\n")
            self._add_scalars(iteration, scalars(record["layers"]))
        except OSError as error:
            self._without(error)

    def _write(self, iteration: int, numbers: dict[str, float], more: dict) -> None:
        if not self.file:
            return
        now = self.clock + time.monotonic()
        self.file.write(json.dumps({"iteration": iteration, "time": round(now, 3), **numbers, **more}) + "\n")
        self._add_scalars(iteration, {f"train/{name}": value for name, value in numbers.items()})

    def _routing_file(self, component: Component) -> TextIO:
        if component not in self.routing_files:
            assert self.folder is not None
            self.routing_files[component] = (self.folder / ROUTING_LOGS[component]).open("a", buffering=1)
        return self.routing_files[component]

    def _write_routing(self, iteration: int, record: dict, warnings: list[str], component: Component) -> None:
        if not self.file:
            return
        line = json.dumps(rounded({"iteration": iteration, **record, "warnings": warnings}))
        self._routing_file(component).write(line + "\n")
        self._add_scalars(iteration, routing_scalars(record, f"routing/{prefix_of(component)}"))

    def _add_scalars(self, iteration: int, values: dict[str, float]) -> None:
        if self.trackers is not None:
            self.trackers.scalars(iteration, values)
        if self.writer is None:
            return
        for name, value in values.items():
            self.writer.add_scalar(name, value, iteration, walltime=self.clock + time.monotonic())

    def track(self, options: LoggingConfig, record: Callable[[], dict]) -> None:
        """Write to the trackers that a run asks for, too; `record`: what they are told of it."""
        if not self.active or self.folder is None or not options.trackers:
            return
        try:
            self.trackers = Trackers(options, self.folder, record(), self.say)
        except OSError as error:
            self._without(error)

    def _left(self, iteration: int) -> str:
        if self.first_iteration is None:  # the first step pays for warming up, and says nothing about the others
            self.first_iteration, self.started = iteration, time.monotonic()
            return "..."
        seconds = (
            (time.monotonic() - self.started) / (iteration - self.first_iteration) * (self.train_steps - iteration)
        )
        return f"{seconds / 60:.0f} min left" if seconds > 120 else f"{seconds:.0f} s left"

    def _add_up(self, numbers: dict[str, float]) -> None:
        if self.imbalances:  # the first step pays for starting the workers
            self.waited += numbers["data_wait_share"] * numbers["step_seconds"]
            self.seconds += numbers["step_seconds"]
        for name in COSTS:
            self.imbalances.setdefault(name, []).append(numbers[f"imbalance/{name}"])

    def say(self, text: str) -> None:
        """Print a line on the process that logs."""
        if self.active:
            print(f"{self.title} {text}", flush=True)

    def data_report(self, counters: list[dict]) -> None:
        """The loaders' counters and, over the steps so far, wait share and imbalance; also in data.json."""
        if not self.active:
            return
        means = {name: sum(values) / len(values) for name, values in self.imbalances.items()}
        report = {
            "ranks": counters,
            "data_wait_share": self.waited / self.seconds if self.seconds else None,  # None: a single step
            "imbalance": means,  # busiest data-parallel rank over the mean
        }
        if self.folder is not None:
            try:
                (self.folder / "data.json").write_text(json.dumps(report, indent=1))
            except OSError as error:
                self._without(error)
        wait = f"; steps waited {report['data_wait_share']:.1%} of the time" if self.seconds else ""
        even = ", ".join(f"{name} {value:.2f}" for name, value in means.items())
        self.say(f"data: {summary(counters)}{wait}; busiest rank over the mean: {even}")

    def close(self, finished: bool = True) -> None:
        """What is still to be written may not fit; the run has its exit code all the same."""
        if self.trackers is not None:
            self.trackers.close(finished)
        files = (self.file, *self.routing_files.values(), self.validation_file, self.activations_file)
        for item in (self.writer, *files):
            try:
                if item:
                    item.close()
            except OSError as error:
                self.say(f"cannot write the log to its end ({error})")


def rounded(value, digits: int = 5):
    """Nested plain data with its floats shortened."""
    if isinstance(value, dict):
        return {key: rounded(item, digits) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item, digits) for item in value]
    return round(value, digits) if isinstance(value, float) else value


def _line(numbers: dict[str, float]) -> str:
    formats = {
        "loss": "loss {:.4f}",
        "kl_loss": "teacher {:.4f}",
        "rewards/accuracies": "prefers {:.0%}",
        "rewards/margins": "margin {:.3f}",
        "load_balancing_loss": "aux {:.3f}",
        "routing/imbalance/rank": "busiest rank {:.2f}x",
        "lr": "lr {:.2e}",
        "grad_norm": "grad {:.3f}",
        "loss_scale": "scale {:g}",
        "max_load": "busiest expert {:.1f}x",
        "tokens_per_second": "{:,.0f} tok/s",
        "tflops_per_device": "{:.3g} TFLOP/s",
        "mfu": "MFU {:.1%}",
        "step_seconds": "{:.2f} s",
        "data_wait_share": "wait {:.0%}",
        "padding_share": "pad {:.1%}",
        "peak_memory_gib": "{:.1f} GiB",
    }
    return " | ".join(text.format(numbers[name]) for name, text in formats.items() if name in numbers)


def rewind(path: Path, iteration: int) -> float:
    """Drop the records of steps after `iteration`, and a line that a kill cut off; returns the time of the last one left."""
    if not path.exists():
        return 0.0
    kept, last = [], 0.0
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if record["iteration"] <= iteration:
            kept.append(line + "\n")
            last = max(last, record.get("time", 0.0))
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept))
    temporary.rename(path)
    return last


def imbalance(ranks: list[Counts]) -> dict[str, float]:
    """Busiest of the data-parallel ranks over their mean, for each of COSTS; 1.0 = even."""
    found = {}
    for name, field in COSTS.items():
        values = [getattr(counts, field) for counts in ranks]
        found[f"imbalance/{name}"] = max(1.0, max(values) / max(sum(values) / len(values), 1e-9))
    return found


def load_imbalance(load_LE: torch.Tensor, expert_parallel_size: int) -> dict[str, float]:
    """How much more work the busiest has than the mean, in the layer where it is worst: 1.0 is level.

    `load_LE`: tokens of each expert in each MoE layer. An expert-parallel rank holds E / size neighbours, and the others
    wait for the busiest: loads [6, 2, 1, 3] on two ranks -> expert 2.0, rank 8 / 6 = 1.33. Of ranks the mean over layers
    too (`rank_mean`), and what the waiting costs (`wait_share`): the share of the experts' time in which the mean rank has
    nothing to do, where a rank's time is its tokens' (dense products at one rate) and every layer waits for its busiest. A
    step's tokens are counted together; its micro-batches, each on its own, are less level, so it costs at least this.
    """
    load_LE = load_LE.double()
    load_LR = load_LE.unflatten(1, (expert_parallel_size, -1)).sum(-1)
    worst = {
        name: (load.amax(1) / load.mean(1).clamp(min=1e-9)).max()
        for name, load in (("expert", load_LE), ("rank", load_LR))
    }
    busiest_L, mean_L = load_LR.amax(1), load_LR.mean(1)
    worst["rank_mean"] = (busiest_L / mean_L.clamp(min=1e-9)).mean()
    worst["wait_share"] = 1.0 - mean_L.sum() / busiest_L.sum() if busiest_L.any() else busiest_L.sum()
    return {f"routing/imbalance/{name}": float(value) for name, value in worst.items()}


def routing_scalars(record: dict, where: str = "routing/") -> dict[str, float]:
    """TensorBoard's names and numbers of a routing record: shares of the choices by group, and what each layer sums up to."""
    scalars: dict[str, float] = {}
    for layer in record["layers"]:
        prefix = f"{where}layer{layer['layer']}"
        for group, numbers in {"all": layer, **layer["groups"]}.items():
            total = max(sum(numbers["choices"]), 1)
            scalars |= {f"{prefix}/{group}/expert{e}": count / total for e, count in enumerate(numbers["choices"])}
            scalars |= {f"{prefix}/{group}/{name}": numbers[name] for name in ("entropy", "top1", "top2")}
        asked = sum(layer["choices"]) + sum(layer["dropped"])
        scalars[f"{prefix}/dropped_share"] = sum(layer["dropped"]) / max(asked, 1)
        scalars |= {f"{prefix}/{name}": layer[name] for name in LAYER_NUMBERS if name in layer}
    return scalars


def routing_summary(record: dict) -> dict[str, float]:
    """The worst layer in two numbers, for the step's own line."""
    return {
        "max_load": max(layer["max_load"] for layer in record["layers"]),
        "router_entropy": min(layer["entropy"] for layer in record["layers"]),
    }


def router_losses(
    chunks: Sequence[MoELlava], num_microbatches: int, by_layer: bool, component: Component = "language"
) -> tuple[dict[str, torch.Tensor], dict[str, list[float]]]:
    """(mean over a part's MoE layers of its routers' losses in the last step, before their coefficients; the same by layer).

    The means stay on the device, and nothing waits for them; `by_layer` waits. Collective: every rank adds its shares,
    also one that has no MoE layer, and all get the result.
    """
    moe, freq = chunks[0].run.mixtures[component], layer_freq(chunks[0], component)
    names = ["load_balancing_loss"] if moe.moe_router_load_balancing_type != "none" else []
    names += ["z_loss"] if moe.moe_z_loss_coeff else []
    sums_CL = torch.zeros(len(names), len(freq), device=platform.device())
    for layer, router in RoutingObserver(chunks, component).routers.items():
        for row, name in enumerate(names):
            sums_CL[row, layer] = router.losses.get(name, 0.0)
        router.losses.clear()
    dist.all_reduce(sums_CL)
    by_layer_CL = sums_CL / parallel.data_parallel_size() * (1.0 / num_microbatches)
    means_C = by_layer_CL.sum(dim=1) / sum(freq)
    means = dict(zip(names, means_C.unbind(), strict=True))
    return means, dict(zip(names, by_layer_CL.tolist(), strict=True)) if by_layer else {}


def prefix_of(component: Component) -> str:
    """What stands before the names of a part's numbers in a log; the language model's have none."""
    return "" if component == "language" else f"{component}/"
