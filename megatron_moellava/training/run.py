"""From a run to a finished stage: validate it, build loader and trainer, train."""

import math
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from megatron_moellava import parallel, platform
from megatron_moellava.backbones import get_backbone
from megatron_moellava.config import ConfigError, RunConfig
from megatron_moellava.costs.balance import tower_weight
from megatron_moellava.data.loader import Loader, WorkerTrouble, build_train_loader, worker_trouble
from megatron_moellava.data.tokenizer import load_tokenizer
from megatron_moellava.model.precision import settle_and_say
from megatron_moellava.stages import PREFERENCE
from megatron_moellava.towers import tower_of_run
from megatron_moellava.training.distillation import give_teacher
from megatron_moellava.training.held_out import HeldOut
from megatron_moellava.training.lock import lock_folder
from megatron_moellava.training.loop import Trainer
from megatron_moellava.training.reference import give_reference
from megatron_moellava.validation.run import validate_run
from megatron_moellava.validation.tokenizer import too_large
from megatron_moellava.validation.training import cooldown_problem


def train(run: RunConfig) -> int:
    """Train the stage that the run describes. Returns the exit code; see moellava train.

    Raises WorkerTrouble when a data worker dies.
    """
    validate_run(run, platform.machine())
    parallel.initialize(run.parallel, run.training.seed)
    lock = None
    try:
        lock = lock_folder(run.checkpoint.save, parallel.say)
        for sentence in platform.found():
            parallel.say(sentence)
        trainer = build_trainer(settle_and_say(run))
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
    reference = give_reference(run, loader, build_loader) if run.training.stage == PREFERENCE else None
    teacher = give_teacher(run, loader) if run.training.distillation else None
    return Trainer(run, loader, train_steps(run, loader), _held_out(run), reference, teacher)


def _held_out(run: RunConfig) -> HeldOut | None:
    if not run.validation.sources:
        return None
    loaders: dict[str, Loader] | None = None
    if parallel.reads_data():
        loaders = {}
        for source in run.validation.sources:
            stem = Path(source.path).stem
            name = stem if stem not in loaders else f"{stem}-{len(loaders)}"
            data = replace(run.data, sources=(replace(source, weight=1.0),), sampler="shuffle")
            # Stage 4 as well is validated on conversations: what its pairs are about must not be all that is left.
            loaders[name] = build_loader(replace(run, data=data, training=replace(run.training, seed=0)), pairs=False)
    return HeldOut(run, loaders)


def build_loader(run: RunConfig, pairs: bool | None = None) -> Loader:
    """The training loader of this data-parallel rank; of `pairs` of answers by default where the stage trains on them.

    Raises ConfigError for a tokenizer with more ids than the backbone's vocabulary.
    """
    backbone = get_backbone(run.model.backbone)
    tower, tokenizer = tower_of_run(run), load_tokenizer(run.data.tokenizer)
    if tokenizer.vocab_size > backbone.vocab_size:
        raise ConfigError(too_large(run.data.tokenizer, tokenizer.vocab_size, backbone))
    return build_train_loader(
        run.data,
        tokenizer,
        tower,
        seed=run.training.seed,
        rank=parallel.data_parallel_rank(),
        world_size=parallel.data_parallel_size(),
        micro_batch_size=run.training.micro_batch_size,
        pad_multiple=run.row_multiple,
        accumulation_steps=run.num_microbatches(parallel.data_parallel_size()),
        template=run.data.template or backbone.template,
        context_length=backbone.context_length,
        cache_folder=str(Path(run.checkpoint.save) / "data_index") if run.checkpoint.save else None,
        tower_weight=tower_weight(run, backbone, tower),
        pairs=run.training.stage == PREFERENCE if pairs is None else pairs,
    )


def train_steps(run: RunConfig, loader: Loader | None) -> int:
    """`training.train_steps`, or the steps of one epoch. Raises ConfigError where a run so short trains nothing."""
    found: list[tuple[int, str, str] | None] = [None]
    if loader is not None:
        found = [_steps_of(run, loader.rows_per_epoch())]
    dist.broadcast_object_list(found, src=0)
    assert found[0] is not None, "the first process reads data"
    steps, problem, warning = found[0]
    if problem:
        raise ConfigError(problem)
    if warning:
        parallel.say(f"note: {warning}")
    return steps


def _steps_of(run: RunConfig, rows: int) -> tuple[int, str, str]:
    """(steps, what makes the run useless, what makes it odd)"""
    batch, steps = (
        run.training.global_batch_size,
        run.training.train_steps or math.ceil(rows / run.training.global_batch_size),
    )
    warmup = math.ceil(run.optimizer.lr_warmup_fraction * steps)
    if not run.training.train_steps and rows < batch:
        return (
            steps,
            (
                f"training.train_steps=0 asks for one epoch, which fills {rows} rows, fewer than one step of "
                f"training.global_batch_size={batch}: each row would be trained {batch / rows:.1f} times in it; set "
                f"training.global_batch_size to at most {rows}, or training.train_steps to the steps that you want"
            ),
            "",
        )
    if problem := cooldown_problem(run, steps):
        return steps, problem, ""
    if steps == warmup == 1:
        return (
            steps,
            (
                f"optimizer.lr_warmup_fraction={run.optimizer.lr_warmup_fraction} makes the run's only step one of warm-up, "
                "which begins at a learning rate of 0, so nothing would be trained; set optimizer.lr_warmup_fraction=0, or "
                "train for more steps"
            ),
            "",
        )
    warnings = []
    if rows < batch:
        warnings.append(
            f"one step of training.global_batch_size={batch} takes each of the {rows} rows {batch / rows:.1f} times; "
            f"{steps} steps are {steps * batch / rows:.1f} epochs"
        )
    if warmup >= steps:
        warnings.append(
            f"all {steps} steps are warm-up (optimizer.lr_warmup_fraction={run.optimizer.lr_warmup_fraction}): the "
            f"learning rate reaches {(steps - 1) / warmup:.2f} of optimizer.lr={run.optimizer.lr:g}"
        )
    return steps, "", "; ".join(warnings)
