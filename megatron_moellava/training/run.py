"""From a run to a finished stage: validate it, build loader and trainer, train."""

import math
from pathlib import Path

import torch.distributed as dist

from megatron_moellava import parallel, platform
from megatron_moellava.backbones import get_backbone
from megatron_moellava.config import RunConfig
from megatron_moellava.data.loader import Loader, WorkerTrouble, build_train_loader, worker_trouble
from megatron_moellava.data.tokenizer import load_tokenizer
from megatron_moellava.towers import get_tower
from megatron_moellava.training.lock import lock_folder
from megatron_moellava.training.loop import Trainer
from megatron_moellava.validation.run import validate_run
from megatron_moellava.validation.tokenizer import check_size


def train(run: RunConfig) -> int:
    """Train the stage that the run describes. Returns the exit code; see tools/train.py."""
    validate_run(run, platform.MACHINE)
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
    check_size(run.data.tokenizer, tokenizer.vocab_size, backbone)
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
