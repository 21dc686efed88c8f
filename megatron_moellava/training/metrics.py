"""What a step reports: one line on the screen, one JSON line, TensorBoard, and the router's load by modality.

Shapes: B rows, S positions, N tokens, E experts.
"""

import json
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.tensorboard import SummaryWriter

from megatron_moellava import parallel, platform
from megatron_moellava.data.batch import Batch
from megatron_moellava.data.loader import summary
from megatron_moellava.model.context_parallel import share
from megatron_moellava.model.moe_llava import IMAGE_TOKEN, MoELlava

from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

MODALITIES = ("text", "image")
COSTS = ("tokens", "image_tokens", "attention")  # what the ranks of a step should have equally much of


class StepLog:
    """Writes each step's numbers to the terminal, to `steps.jsonl` and to TensorBoard; on the main process only.

    A run that continues from step n drops what an earlier attempt wrote about later steps: the log tells the life of the
    model, each step once. Times are those of a clock that never goes back, whatever is done to the system's.
    """

    def __init__(self, folder: Path | None, tensorboard: bool, title: str, train_steps: int, iteration: int = 0):
        self.active = parallel.is_main_process()
        self.title, self.train_steps = title, train_steps
        self.file = self.writer = None
        self.folder = folder
        if self.active and folder is not None:
            try:
                self._open(folder, tensorboard, iteration)
            except OSError as error:
                self._without(error)
        self.first_iteration, self.started = None, time.monotonic()
        self.waited, self.seconds = 0.0, 0.0  # for data and in all, without the first step
        self.imbalances: dict[str, list[float]] = {}

    def _open(self, folder: Path, tensorboard: bool, iteration: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        last = rewind(folder / "steps.jsonl", iteration)
        self.clock = max(time.time(), last) - time.monotonic()
        purge = iteration + 1 if iteration else None
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=purge) if tensorboard else None
        self.file = (folder / "steps.jsonl").open("a", buffering=1)

    def _without(self, error: OSError) -> None:
        """A log is not worth a run; a disk that stays full will end it at the next checkpoint, with a clear message."""
        self.file = self.writer = self.folder = None
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

    def _write(self, iteration: int, numbers: dict[str, float], more: dict) -> None:
        if not self.file:
            return
        now = self.clock + time.monotonic()
        self.file.write(json.dumps({"iteration": iteration, "time": round(now, 3), **numbers, **more}) + "\n")
        for name, value in numbers.items() if self.writer else ():
            self.writer.add_scalar(f"train/{name}", value, iteration, walltime=now)

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

    def close(self) -> None:
        if self.writer:
            self.writer.close()
        if self.file:
            self.file.close()


def _line(numbers: dict[str, float]) -> str:
    formats = {
        "loss": "loss {:.4f}",
        "load_balancing_loss": "aux {:.3f}",
        "routing/imbalance/rank": "busiest rank {:.2f}x",
        "lr": "lr {:.2e}",
        "grad_norm": "grad {:.3f}",
        "tokens_per_second": "{:,.0f} tok/s",
        "step_seconds": "{:.2f} s",
        "data_wait_share": "wait {:.0%}",
        "padding_share": "pad {:.1%}",
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


class RoutingObserver:
    """Counts how many image and text tokens each expert of each layer takes, exactly, under any layout.

    Active only inside a model's forward pass, so that recomputed layers are not counted twice.
    """

    def __init__(self, chunks: list[MoELlava]):
        self.config = chunks[0].config
        self.layers = [
            layer
            for chunk in chunks
            for layer in chunk.language_model.decoder.layers
            if isinstance(layer.mlp, MoELayer)
        ]
        self.counts_LME = torch.zeros(
            self.config.num_layers, len(MODALITIES), self.config.num_moe_experts, dtype=torch.int64
        )
        self.modality_N: torch.Tensor | None = None
        for layer in self.layers:
            layer.mlp.router.register_forward_hook(self._count(layer.layer_number - 1))

    def observe(self, tokens_BS: torch.Tensor, padding_mask_BS: torch.Tensor | None):
        """Context in which routers are counted. Padding belongs to no modality."""
        modality_BS = (tokens_BS == IMAGE_TOKEN).long()
        if padding_mask_BS is not None:
            modality_BS = modality_BS.masked_fill(~padding_mask_BS, -1)
        modality_BS = share(modality_BS)
        if self.config.sequence_parallel:
            size, rank = (
                parallel_state.get_tensor_model_parallel_world_size(),
                parallel_state.get_tensor_model_parallel_rank(),
            )
            modality_BS = modality_BS.chunk(size, dim=1)[rank]
        self.modality_N = modality_BS.transpose(0, 1).reshape(-1)
        return self

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.modality_N = None

    def _count(self, layer: int):
        def hook(router, inputs, output):
            if self.modality_N is None:
                return
            _, map_NE = output
            for modality in range(len(MODALITIES)):
                self.counts_LME[layer, modality] += map_NE[self.modality_N == modality].sum(dim=0).cpu()

        return hook

    def collect(self) -> torch.Tensor:
        """Counts [layers, modality, experts] of all ranks since the last call; each token counted once."""
        total = self.counts_LME.clone().to(platform.device())
        if not self.config.sequence_parallel and parallel_state.get_tensor_model_parallel_rank() > 0:
            total = torch.zeros_like(
                total
            )  # without sequence parallelism every tensor-parallel rank saw the same tokens
        dist.all_reduce(total)
        self.counts_LME.zero_()
        return total.cpu()


def costs(batches: list[Batch]) -> list[int]:
    """COSTS of one rank's step: real tokens, visual tokens, and the pairs of positions that attention multiplies."""
    return [
        sum(int(batch.padding_mask_BS.sum()) for batch in batches),
        sum(int((batch.tokens_BS == IMAGE_TOKEN).sum()) for batch in batches),
        sum(attention_cost(batch) for batch in batches),
    ]


def attention_cost(batch: Batch) -> int:
    """Sum of squared lengths, padding included, since it is computed.

    >>> a packed row with cu_seqlens [0, 3, 5] -> 3 * 3 + 2 * 2 = 13; two padded rows of 4 -> 32
    """
    if batch.cu_seqlens is None:
        return batch.tokens_BS.shape[0] * batch.tokens_BS.shape[1] ** 2
    return int((batch.cu_seqlens.diff().long() ** 2).sum())


def imbalance(costs_RC: torch.Tensor) -> dict[str, float]:
    """Busiest rank over the mean of R data-parallel ranks, for each of COSTS; 1.0 = even."""
    worst_C = costs_RC.max(dim=0).values / costs_RC.mean(dim=0).clamp(min=1e-9)
    return {f"imbalance/{name}": max(1.0, float(value)) for name, value in zip(COSTS, worst_C, strict=True)}


def load_imbalance(load_LE: torch.Tensor, expert_parallel_size: int) -> dict[str, float]:
    """How much more work the busiest has than the mean, in the layer where it is worst: 1.0 is level.

    `load_LE`: tokens of each expert in each MoE layer. An expert-parallel rank holds E / size neighbours, and the others
    wait for the busiest: loads [6, 2, 1, 3] on two ranks -> expert 2.0, rank 8 / 6 = 1.33.
    """
    load_LE = load_LE.double()
    load_LR = load_LE.unflatten(1, (expert_parallel_size, -1)).sum(-1)
    worst = {
        name: (load.amax(1) / load.mean(1).clamp(min=1e-9)).max()
        for name, load in (("expert", load_LE), ("rank", load_LR))
    }
    return {f"routing/imbalance/{name}": float(value) for name, value in worst.items()}


def aux_losses(config, num_microbatches: int, iteration: int) -> dict[str, float]:
    """Mean over MoE layers and micro-batches of the router's losses, before their coefficients; collective."""
    names = ["load_balancing_loss"] + (["z_loss"] if config.moe_z_loss_coeff else [])
    losses: dict[str, torch.Tensor] = {}
    get_moe_metrics_tracker().report(
        loss_scale=1.0 / num_microbatches,
        iteration=iteration,
        force_initialize=True,
        track_names=names,
        num_layers=config.num_layers,
        moe_layer_freq=config.moe_layer_freq,
        total_loss_dict=losses,
    )
    return {name: float(value) for name, value in losses.items()}
