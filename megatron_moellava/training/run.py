"""From a command line to a finished stage: gather the run, validate it, build loader and trainer, train."""

import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from megatron_moellava import parallel
from megatron_moellava.backbones import get_backbone
from megatron_moellava.checkpoint.description import read_description
from megatron_moellava.checkpoint.folders import newest_checkpoint
from megatron_moellava.config import ConfigError, RunConfig, from_dict, read_yaml, set_override, split_override
from megatron_moellava.data.loader import Loader, WorkerTrouble, build_train_loader, worker_trouble
from megatron_moellava.data.tokenizer import load_tokenizer
from megatron_moellava.model.weights import model_names
from megatron_moellava.towers import get_tower
from megatron_moellava.training.lock import lock_folder
from megatron_moellava.training.loop import Trainer
from megatron_moellava.training.validate import validate


def load_run(*, config: str | None = None, flags: dict[str, object], overrides: Sequence[str] = ()) -> RunConfig:
    """The run of a command line. Weakest first: the model of the loaded checkpoint, the YAML file, flags, overrides.

    `flags`: dotted path -> value; empty values count as not given.
    """
    tree = _model_of_checkpoint(flags.get("checkpoint.load"))
    for section, fields in (read_yaml(config) if config else {}).items():
        tree[section] = {**tree[section], **fields} if section in tree and isinstance(fields, dict) else fields
    for name, value in flags.items():
        if value:
            set_override(tree, name, value)
    for override in overrides:
        set_override(tree, *split_override(override))
    return from_dict(RunConfig, tree)


def _model_of_checkpoint(load: str | None) -> dict:
    checkpoint = newest_checkpoint(load) if load else None
    if checkpoint is None:
        return {}
    moe = read_description(checkpoint).model.get("moe")
    return {"model": model_names(checkpoint)} | ({"moe": dict(moe)} if moe else {})


def validate_run(run: RunConfig) -> None:
    """Raises ConfigError when the run cannot work with the processes that torchrun (or SLURM) has been asked for."""
    validate(run, int(os.environ.get("WORLD_SIZE", 1)))


def train(run: RunConfig) -> int:
    """Train the stage that the run describes. Returns the exit code; see tools/train.py."""
    validate_run(run)
    parallel.initialize(run.parallel, run.training.seed)
    lock = None
    try:
        lock = lock_folder(run.checkpoint.save, parallel.say)
        trainer = build_trainer(run)
        return trainer.train()
    except RuntimeError as error:
        # torch raises it in the middle of anything, as soon as it hears that a worker has died.
        if isinstance(error, WorkerTrouble) or "DataLoader worker" not in str(error):
            raise
        raise WorkerTrouble(worker_trouble(parallel.data_parallel_rank(), error)) from error
    finally:
        parallel.shutdown()
        if lock is not None:
            lock.close()


def build_trainer(run: RunConfig) -> Trainer:
    """Model, optimizer, data and state of a validated run; the process groups must exist."""
    loader = build_loader(run) if parallel.reads_data() else None
    return Trainer(run, loader, train_steps(run, loader))


def build_loader(run: RunConfig) -> Loader:
    """The training loader of this data-parallel rank."""
    backbone = get_backbone(run.model.backbone)
    tokenizer = load_tokenizer(run.data.tokenizer)
    if tokenizer.vocab_size > backbone.vocab_size:
        raise ConfigError(
            f"data.tokenizer={run.data.tokenizer} has {tokenizer.vocab_size} tokens, more than the vocab_size="
            f"{backbone.vocab_size} of {backbone.name}; use the tokenizer of this backbone"
        )
    return build_train_loader(
        run.data,
        tokenizer,
        get_tower(run.model.tower),
        seed=run.training.seed,
        rank=parallel.data_parallel_rank(),
        world_size=parallel.data_parallel_size(),
        micro_batch_size=run.training.micro_batch_size,
        pad_multiple=run.row_multiple,
        accumulation_steps=run.num_microbatches(parallel.data_parallel_size()),
        template=run.data.template or backbone.template,
        context_length=backbone.context_length,
        cache_folder=str(Path(run.checkpoint.save) / "data_index") if run.checkpoint.save else None,
    )


def train_steps(run: RunConfig, loader: Loader | None) -> int:
    """`training.train_steps`, or the steps of one epoch."""
    steps = [run.training.train_steps]
    if not steps[0]:
        if loader is not None:
            steps = [max(1, math.ceil(loader.rows_per_epoch() / run.training.global_batch_size))]
        dist.broadcast_object_list(steps, src=0)
    return steps[0]
