"""Trainers of a tiny model in one process, on the rows of the layout suite: any roles, any settings."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megatron_moellava import parallel, platform
from megatron_moellava.config import ParallelConfig, RunConfig, from_dict, set_override
from megatron_moellava.training.loop import Trainer
from tests.distributed.rows import MICRO_BATCH, NUM_ROWS, SEQ_LENGTH, Rows
from tests.helpers.process_groups import release_groups

MOE = {"num_moe_experts": 4, "placement": "sparse", "moe_aux_loss_coeff": 0.1}


@contextmanager
def one_layout() -> Iterator[None]:
    """Groups are made once: each has threads that poll, and a set for every trainer would add up to a standstill."""
    parallel.initialize(ParallelConfig(), 1)
    yield
    parallel.shutdown()
    release_groups()


def run_config(trains: tuple[str, ...], rows: str = "packed", moe: dict | None = MOE, **more) -> RunConfig:
    tree: dict = {"moe": dict(moe)} if moe else {}
    settings = {
        "model.backbone": "llama-tiny",
        "model.tower": "clip-tiny",
        "data.packing": rows != "padded",
        "data.seq_length": SEQ_LENGTH,
        "training.stage": 2,
        "training.trains": list(trains),
        "training.precision": "fp32",
        "training.micro_batch_size": MICRO_BATCH[rows],
        "training.global_batch_size": NUM_ROWS[rows],
        "optimizer.lr_warmup_fraction": 0.0,
        "logging.tensorboard": False,
    }
    for name, value in (settings | more).items():
        set_override(tree, name, value)
    return from_dict(RunConfig, tree)


def started(trains: tuple[str, ...], rows: str = "packed", **more) -> Trainer:
    run = run_config(trains, rows, **more)
    platform.seed_everything(1)
    parallel.seed_model_parallel(1)
    trainer = Trainer(run, None, 10)
    trainer.loader = Rows(rows, trainer.chunks[0].backbone.vocab_size, trainer.chunks[0].tower, 0, 1)
    for chunk in trainer.wrapped:
        chunk.train()
    return trainer


def state(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Everything of the model that a step may move: parameters, buffers, and the histories of FP8 by module."""
    (model,) = trainer.chunks
    tensors = {name: tensor.detach().clone() for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    for number, history in enumerate(trainer.fp8.state() if trainer.fp8 else []):
        tensors[f"fp8 history {number}"] = history.clone()
    return tensors
