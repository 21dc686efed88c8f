"""A teacher's logits of every label of a data set, written once: a pass of a checkpoint as it is used, under any layout.

Shard by shard (`data/teacher_logits.py`): what is there when the same command comes again is not computed again. Suffixes:
B rows, S positions, L those of this context-parallel rank, T labels, K tokens, C = K + 1, V vocabulary of this rank.
"""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from megatron_moellava import parallel, platform
from megatron_moellava.checkpoint.base import SEAL_FIRST
from megatron_moellava.checkpoint.description import read_description
from megatron_moellava.checkpoint.folders import require_checkpoint
from megatron_moellava.config import CheckpointError, ConfigError, MoELlavaError, RunConfig
from megatron_moellava.data.batch import Batch
from megatron_moellava.data.encode import IGNORE_INDEX
from megatron_moellava.data.loader import LATER, Loader
from megatron_moellava.data.order import Items
from megatron_moellava.data.teacher_logits import Taught, TeacherDescription, begin, checksum, label_key, write_shard
from megatron_moellava.model.context_parallel import share, whole_rows
from megatron_moellava.model.inputs import model_inputs
from megatron_moellava.model.precision import settle_and_say
from megatron_moellava.model.vocabulary import below, top_ids, with_rest
from megatron_moellava.training.distillation import DistillationLoss
from megatron_moellava.training.one_pass import each_row_once, model_as_used, passed_once, raise_together
from megatron_moellava.training.run import build_loader
from megatron_moellava.validation.run import validate_run

Found = dict[int, tuple[int, Taught]]  # row of the data set -> (checksum of its labels, what the teacher says of them)


def make_teacher(run: RunConfig, folder: Path, *, top_k: int, dtype: str, rows_per_shard: int) -> None:
    """Write the logits of `run.checkpoint.load` for all rows of `run.data`, and say so. Collective.

    Raises ConfigError, CheckpointError or DataError before anything is written.
    """
    validate_run(run, platform.machine())
    parallel.initialize(run.parallel, run.training.seed)
    try:
        run = settle_and_say(run)
        loader = build_loader(each_row_once(run)) if parallel.reads_data() else None
        description, starts = _begin_together(run, folder, loader, top_k, dtype, rows_per_shard)
        if starts:
            _write(run, folder, description, starts, loader)
        done = len(description.starts) - len(starts)
        there = f" ({done} of {len(description.starts)} shards were there)" if done else ""
        parallel.say(f"the {top_k} likeliest tokens at every label of {description.rows:,} rows: {folder}{there}")
    finally:
        parallel.shutdown()


def _begin_together(
    run: RunConfig, folder: Path, loader: Loader | None, top_k: int, dtype: str, rows_per_shard: int
) -> tuple[TeacherDescription, list[int]]:
    """(what the folder is to hold, first rows of the shards that are missing in it), on every rank."""
    box: list = [None]
    fault = None
    if dist.get_rank() == 0:  # the first process reads data
        assert loader is not None
        try:
            description = _description(run, loader, top_k=top_k, dtype=dtype, rows_per_shard=rows_per_shard)
            box = [(description, begin(folder, description))]
        except (MoELlavaError, OSError) as error:
            fault = str(error)
    raise_together(fault)
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _description(run: RunConfig, loader: Loader, **options) -> TeacherDescription:
    assert loader.content is not None
    checkpoint = require_checkpoint(str(run.checkpoint.load))
    seal = read_description(checkpoint).checksum
    if seal is None:
        raise CheckpointError(f"{checkpoint} has no seal by which its logits could name it; {SEAL_FIRST}")
    size = loader.micro_batches.pipeline.encoder.tokenizer.vocab_size
    if options["top_k"] > size:
        raise ConfigError(f"--top-k {options['top_k']} is more than the tokenizer's {size} tokens; use at most these")
    computed = {
        "content": loader.content,
        "image_aspect_ratio": run.data.image_aspect_ratio,
        "scale_multimodal_embeddings": run.model.scale_multimodal_embeddings,
        "precision": run.training.precision,
    }
    return TeacherDescription(
        teacher=seal,
        computed=json.loads(json.dumps(computed)),
        labels=json.loads(json.dumps(label_key(loader.content, LATER))),
        vocab_size=size,
        rows=loader.rows,
        **options,
    )


def _write(
    run: RunConfig, folder: Path, description: TeacherDescription, starts: list[int], loader: Loader | None
) -> None:
    chunks = model_as_used(run, require_checkpoint(str(run.checkpoint.load)))
    step = partial(_forward_step, description)
    shards: list[Items] = []
    if loader is not None:
        assert loader.arranged is not None
        shards = [loader.arranged(list(description.rows_of(start))) for start in starts]
    counts: list = [[len(items) for items in shards]]
    dist.broadcast_object_list(counts, src=0)
    for number, start in enumerate(starts):
        items = shards[number] if shards else None
        found: Found = {}
        with torch.no_grad():
            for batch, (ids_TK, log_probs_TC) in passed_once(
                run, chunks, loader, counts[0][number], step, "the teacher's logits", items
            ):
                found |= _by_row(batch, ids_TK.cpu().numpy(), log_probs_TC.cpu().numpy())
        _write_together(folder, description, start, found if parallel.speaks_for_its_replicas() else {})
        parallel.say(f"rows {start:,} to {description.rows_of(start)[-1]:,} of {description.rows:,}")


def _forward_step(description: TeacherDescription, batches: Iterator[Batch], model):
    batch = next(batches)
    output = model(**(model_inputs(batch) | DistillationLoss.inputs))
    return output, partial(_read, batch, description)


def _read(batch: Batch, description: TeacherDescription, logits_BLV: torch.Tensor):
    """The second: ([T, K] ids, [T, C] log-probabilities of these and of all others), of all labels of the batch in their
    order, on every rank of the last stage."""
    is_label_BL = share(batch.labels_BS) != IGNORE_INDEX
    logits_TV = below(logits_BLV[is_label_BL], description.vocab_size)
    ids_TK = top_ids(logits_TV, description.top_k)
    found = ids_TK, with_rest(logits_TV, ids_TK).log_softmax(dim=1)
    return logits_BLV.new_zeros(1), tuple(_of_whole_rows(values, batch.labels_BS, is_label_BL) for values in found)


def _of_whole_rows(values_TC: torch.Tensor, labels_BS: torch.Tensor, is_label_BL: torch.Tensor) -> torch.Tensor:
    """[T of the whole rows, C] from the T of this context-parallel rank."""
    if parallel.context_parallel_size() == 1:
        return values_TC
    placed_BLC = values_TC.new_zeros(*is_label_BL.shape, values_TC.shape[1])
    placed_BLC[is_label_BL] = values_TC
    return whole_rows(placed_BLC)[labels_BS != IGNORE_INDEX]


def _by_row(batch: Batch, ids_TK: np.ndarray, log_probs_TC: np.ndarray) -> Found:
    found: Found = {}
    labels_BS, begin = batch.labels_BS.cpu(), 0
    parts = labels_BS.unbind() if batch.cu_seqlens is None else labels_BS[0].tensor_split(batch.cu_seqlens[1:-1].long())
    for row, labels_S in zip(batch.rows, parts, strict=False):  # the last part may be padding
        labels_T = labels_S[labels_S != IGNORE_INDEX].numpy()
        own = slice(begin, begin + len(labels_T))
        found[row] = checksum(labels_T), Taught(ids_TK[own], log_probs_TC[own])
        begin = own.stop
    return found


def _write_together(folder: Path, description: TeacherDescription, start: int, own: Found) -> None:
    gathered: list = [None] * dist.get_world_size() if dist.get_rank() == 0 else []
    dist.gather_object(own, gathered or None, dst=0)
    fault = None
    if gathered:
        found: Found = {row: taught for part in gathered for row, taught in part.items()}
        try:
            write_shard(folder, description, start, found)
        except OSError as error:
            fault = f"cannot write into {folder} ({error}); the same command goes on when it can be written"
    raise_together(fault)
