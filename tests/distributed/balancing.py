"""The routers' losses under a layout, beside the same computed from their definitions in fp64 on one process.

A job trains one step twice from the same weights, with the losses and with coefficients of 0. What the first step differs by
in the gradient of the last router is the gradient of its losses alone, since nothing after it has any.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from megatron_moellava import parallel
from megatron_moellava.config import Component, RunConfig, from_dict, set_override
from megatron_moellava.data.batch import Batch, pack, pad
from megatron_moellava.data.encode import IGNORE_INDEX, IMAGE_TOKEN, EncodedSample
from megatron_moellava.data.loader import Batches
from megatron_moellava.routers import knows_modality
from megatron_moellava.routing.observer import RoutingObserver
from megatron_moellava.training.loop import Trainer
from megatron_moellava.training.metrics import prefix_of
from tests.distributed.shards import fill, gather_gradients

from megatron.core import parallel_state

SAMPLES, SEQ_LENGTH = 8, 64
AUX, Z = 10.0, 0.5  # coefficients that make the losses larger than the cross-entropy
LENGTHS = (9, 31, 14, 40, 22, 11, 27, 17)
SECTIONS = {"language": "moe", "tower": "tower_moe", "projector": "projector_moe"}
ROUTERS = {  # the last one of each part of the model
    "language": "language_model.decoder.layers.{layer}.mlp.router.weight",
    "tower": "vision_tower.decoder.layers.{layer}.mlp.router.weight",
    "projector": "projector.router.weight",
}
SHOWN = (0, 2, 5)  # samples with a picture before them, in jobs with pictures


class Samples(Batches):
    """The micro-batches of one data-parallel rank: `size` padded rows, or a packed row of `size` samples; text alone, or with
    `pictures` in some of them."""

    def __init__(self, rows: str, size: int, rank: int, ranks: int, pictures: bool):
        draw = np.random.default_rng(7)
        samples = [_sample(str(number), draw.integers(3, 400, length)) for number, length in enumerate(LENGTHS)]
        if pictures:
            samples = [_shown(sample) if n in SHOWN else sample for n, sample in enumerate(samples)]
        groups = [samples[start : start + size] for start in range(0, SAMPLES, size)][rank::ranks]
        make = self._packed if rows == "packed" else self._padded
        self.batches: Iterator[Batch] = iter([make(group) for group in groups])

    @staticmethod
    def _packed(samples: list[EncodedSample]) -> Batch:
        return pack(samples, _pixels(samples), 2 * SEQ_LENGTH, 0, (3, 72, 72))

    @staticmethod
    def _padded(samples: list[EncodedSample]) -> Batch:
        return pad(samples, _pixels(samples), 4, 0, (3, 72, 72))

    def __next__(self) -> Batch:
        return next(self.batches)


def _sample(name: str, tokens_S: np.ndarray) -> EncodedSample:
    labels_S = np.append(tokens_S[1:], IGNORE_INDEX)
    return EncodedSample(id=name, tag="", tokens_S=tokens_S.astype(np.int64), labels_S=labels_S.astype(np.int64))


def _shown(sample: EncodedSample) -> EncodedSample:
    """The sample behind a picture of clip-tiny's 36 visual tokens."""
    tokens_S = np.concatenate([np.full(36, IMAGE_TOKEN), sample.tokens_S])
    labels_S = np.concatenate([np.full(36, IGNORE_INDEX), sample.labels_S])
    return replace(sample, tokens_S=tokens_S, labels_S=labels_S)


def _pixels(samples: list[EncodedSample]) -> list[np.ndarray]:
    """Of each picture, whatever micro-batch it is in."""
    shown = [sample for sample in samples if sample.tokens_S[0] == IMAGE_TOKEN]
    draws = [np.random.default_rng(int(sample.id)) for sample in shown]
    return [draw.standard_normal((1, 3, 72, 72), dtype=np.float32) for draw in draws]


def trainer_of(job: dict, aux: float, z: float | None) -> Trainer:
    packed, size, section = job["rows"] == "packed", job["size"], SECTIONS[job["component"]]
    tree: dict = {section: {"num_moe_experts": 4} | job["moe"]}
    settings = {
        "model.backbone": "llama-tiny",
        "model.tower": "clip-tiny",
        "data.packing": packed,
        "data.seq_length": 2 * SEQ_LENGTH if packed else SEQ_LENGTH,
        f"{section}.moe_aux_loss_coeff": aux,
        f"{section}.moe_z_loss_coeff": z,
        "training.stage": 3,
        "training.trains": None if section == "moe" else ["tower", "projector"],
        "training.precision": "fp32",
        "training.micro_batch_size": 1 if packed else size,
        "training.global_batch_size": SAMPLES // size if packed else SAMPLES,
        "parallel.distributed_timeout_minutes": 1,
        "optimizer.lr_warmup_fraction": 0.0,
        "logging.tensorboard": False,
        "logging.routing_interval": 1,
    }
    for name, value in (settings | {f"parallel.{name}": value for name, value in job["parallel"].items()}).items():
        set_override(tree, name, value)
    run = from_dict(RunConfig, tree)
    parallel.initialize(run.parallel, 1)
    trainer = Trainer(run, None, 3)
    if parallel.reads_data():
        ranks = parallel.data_parallel_rank(), parallel.data_parallel_size()
        trainer.loader = Samples(job["rows"], size, *ranks, pictures=knows_modality(run.moe) or section != "moe")
    fill(trainer.chunks)
    trainer.optimizer.reload_model_params()
    for chunk in trainer.wrapped:
        chunk.train()
    return trainer


def one_step(trainer: Trainer, component: Component) -> tuple[dict, dict, dict, list]:
    """(numbers, routing record, gradients on rank 0, what the routers of this rank were shown) of a step."""
    shown: list[tuple] = []
    for layer, router in RoutingObserver(trainer.chunks, component).routers.items():
        counter = iter(range(1000))

        def keep(router, inputs, output, layer=layer, counter=counter):
            place = (layer, next(counter), parallel.data_parallel_rank(), parallel_state.get_context_parallel_rank())
            tensor = parallel_state.get_tensor_model_parallel_rank()
            hidden_SBH, marks = inputs
            if component != "language":  # rows of images, which no loss knows of
                hidden_SBH = hidden_SBH.flatten(0, 1).unsqueeze(1)
                marks = hidden_SBH.new_zeros(len(hidden_SBH), 1) > 0 if marks is None else marks.reshape(-1, 1)
            padding_SB, is_image_SB = marks.unbind(-1) if marks.dim() == 3 else (marks, torch.zeros_like(marks))
            marked_SBX = torch.cat([hidden_SBH.detach().double(), is_image_SB[..., None].double()], dim=-1)
            shown.append((*place, tensor, marked_SBX, padding_SB, router.weight.detach().double()))

        router.register_forward_hook(keep)
    gradients: list[dict] = []
    update, records = trainer.update, []

    def kept():
        gradients.append(gather_gradients(trainer.chunks, trainer.optimizer)[0])
        return update()

    trainer.update, trainer.log.routing = kept, lambda iteration, record, component: records.append(record)
    numbers, _, _ = trainer.step()
    return numbers, records[0], gradients[0], shown


def run_balancing(job: dict, folder: Path) -> dict:
    """{name: (what a run trains or logs, what the definition says)}"""
    component = job["component"]
    numbers, record, with_losses, shown = one_step(trainer_of(job, AUX, Z), component)
    _, _, without, _ = one_step(trainer_of(job, 0.0, None), component)
    everywhere: list[list] = [[]] * dist.get_world_size()
    dist.all_gather_object(everywhere, shown)
    logged: list[dict] = [{}] * dist.get_world_size()
    prefix, names = prefix_of(component), ("load_balancing_loss", "z_loss")
    dist.all_gather_object(logged, {name: numbers[prefix + name] for name in names if prefix + name in numbers})
    if dist.get_rank():
        return {}
    expected = Definition(job["moe"], [item for rank in everywhere for item in rank])
    layers = record["layers"]
    last = layers[-1]["layer"]
    name = ROUTERS[component].format(layer=last)
    gradient = expected.gradient(last)
    result = {"gradient": worst(with_losses[name] - without[name], gradient), "size": float(gradient.abs().max())}
    for loss in logged[0]:
        by_layer = [expected.value(layer["layer"], loss) for layer in layers]
        result[loss] = worst([layer[loss] for layer in layers], by_layer)
        result[f"mean {loss}"] = worst([rank[loss] for rank in logged], [sum(by_layer) / len(by_layer)] * len(logged))
    return result


def worst(here, there) -> float:
    here, there = torch.as_tensor(here).double(), torch.as_tensor(there).double()
    return float((here - there).abs().max() / there.abs().max())


class Definition:
    """The losses as they are written in the papers, from what all routers were shown, whole micro-batches together.

    Shapes: X = H + 1, the hidden states with a last entry that is 1 for tokens of an image.
    """

    def __init__(self, moe: dict, shown: list[tuple]):
        self.kind = moe["moe_router_load_balancing_type"]
        self.topk, self.sigmoid = moe.get("moe_router_topk", 2), moe.get("moe_router_enable_expert_bias", False)
        groups = moe.get("expert_groups")
        self.apart, self.others = moe.get("balance_per_modality", False), torch.zeros(2, 4, dtype=torch.bool)
        if groups:  # in the order image, shared, text
            self.others[0, : groups["image"]] = True
            self.others[1, 4 - groups["text"] :] = True
        self.weights = {item[0]: item[-1].clone().requires_grad_() for item in shown}
        parts: dict[tuple[int, int, int], list] = {}
        for layer, micro_batch, data_rank, context, tensor, marked_SBX, padding_SB, _ in shown:
            parts.setdefault((layer, micro_batch, data_rank), []).append((context, tensor, marked_SBX, padding_SB))
        # (layer, micro-batch, data-parallel rank) -> real tokens [T, X] of each row
        self.rows = {place: self._rows(pieces) for place, pieces in parts.items()}

    @staticmethod
    def _rows(pieces: list) -> list[torch.Tensor]:
        marked_SBX = torch.cat([piece[2] for piece in pieces])
        real_SB = ~torch.cat([piece[3] for piece in pieces])
        return [marked_SBX[real_SB[:, row], row] for row in range(marked_SBX.shape[1])]

    def micro_batches(self, layer: int) -> list[list[list[torch.Tensor]]]:
        """By number, then by data-parallel rank: the rows."""
        places = sorted(place for place in self.rows if place[0] == layer)
        numbers = sorted({number for _, number, _ in places})
        return [[self.rows[place] for place in places if place[1] == number] for number in numbers]

    def logits(self, layer: int, tokens_TX: torch.Tensor) -> torch.Tensor:
        logits_TE = tokens_TX[:, :-1] @ self.weights[layer].T
        return logits_TE.masked_fill(self.others[tokens_TX[:, -1].long()], -torch.inf)

    def scores(self, layer: int, tokens_TX: torch.Tensor) -> torch.Tensor:
        logits_TE = self.logits(layer, tokens_TX)
        if not self.sigmoid:
            return logits_TE.softmax(dim=-1)
        return logits_TE.sigmoid() / logits_TE.sigmoid().sum(dim=-1, keepdim=True)

    def balance(self, layer: int, tokens_TX: torch.Tensor, counted_TX: torch.Tensor) -> torch.Tensor:
        """E * sum_e(share of the choices of `counted` * mean probability of `tokens`); or that of each modality, with the
        number of its experts, times its share of `tokens`."""
        if not len(tokens_TX):  # a micro-batch without images
            return torch.zeros((), dtype=torch.float64)
        if not self.apart:
            return 4 * self.product(layer, tokens_TX, counted_TX)
        loss = torch.zeros((), dtype=torch.float64)
        for which in (0, 1):
            mine_TX, counted_mine_TX = tokens_TX[tokens_TX[:, -1] == which], counted_TX[counted_TX[:, -1] == which]
            if len(mine_TX):
                experts = 4 - int(self.others[which].sum())
                loss = loss + len(mine_TX) / len(tokens_TX) * experts * self.product(layer, mine_TX, counted_mine_TX)
        return loss

    def product(self, layer: int, tokens_TX: torch.Tensor, counted_TX: torch.Tensor) -> torch.Tensor:
        choices_TK = self.scores(layer, counted_TX).topk(self.topk, dim=-1).indices
        share_E = torch.bincount(choices_TK.flatten(), minlength=4) / choices_TK.numel()
        return (share_E * self.scores(layer, tokens_TX).mean(dim=0)).sum()

    def balancing(self, layer: int) -> torch.Tensor:
        batches, losses = self.micro_batches(layer), []
        if self.kind == "aux_loss":
            losses = [self.balance(layer, torch.cat(rows), torch.cat(rows)) for ranks in batches for rows in ranks]
        if self.kind == "seq_aux_loss":
            losses = [self.balance(layer, row, row) for ranks in batches for rows in ranks for row in rows]
        if self.kind == "global_aux_loss":
            whole = [torch.cat([row for rows in ranks for row in rows]) for ranks in batches]
            losses = [self.balance(layer, whole[i], torch.cat(whole[: i + 1])) for i in range(len(whole))]
        return torch.stack(losses).mean()

    def z(self, layer: int) -> torch.Tensor:
        batches = self.micro_batches(layer)
        logits = [self.logits(layer, torch.cat(rows)) for ranks in batches for rows in ranks]
        squares = [logits_TE.logsumexp(dim=-1).square() for logits_TE in logits]
        return torch.stack([square_T.sum() / max(len(square_T), 1) for square_T in squares]).mean()

    def value(self, layer: int, loss: str) -> float:
        return float((self.z if loss == "z_loss" else self.balancing)(layer))

    def gradient(self, layer: int) -> torch.Tensor:
        loss = Z * self.z(layer) + (AUX * self.balancing(layer) if self.kind != "none" else 0.0)
        return torch.autograd.grad(loss, self.weights[layer])[0].float()
