"""Log-probabilities of every pair's answers by the reference of stage 4: computed once, under any layout, and kept in a file.

The file names the reference by its seal and the rows by the digest of their files, with all that their tokens depend on.
It is read where it is of both, and refused where it is of something else. Suffixes: R rows of the data set, P pairs.
"""

import gc
import hashlib
import json
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from megatron_moellava import parallel, platform
from megatron_moellava.checkpoint.description import read_description
from megatron_moellava.checkpoint.folders import newest_checkpoint, require_checkpoint, write_durably
from megatron_moellava.checkpoint.resume_point import newest_described
from megatron_moellava.config import ConfigError, DataError, MoELlavaError, RunConfig
from megatron_moellava.data.batch import Batch
from megatron_moellava.data.loader import Loader
from megatron_moellava.model.inputs import model_inputs
from megatron_moellava.training.held_out import undisturbed
from megatron_moellava.training.one_pass import each_row_once, model_as_used, passed_once
from megatron_moellava.training.preference import answer_log_probs, answer_positions

TENSOR, KEY = "log_probs", "of"  # in the file: [R, 2], chosen first; what they are of


def give_reference(run: RunConfig, loader: Loader | None, build_loader: Callable[[RunConfig], Loader]) -> str | None:
    """Hand the log-probabilities to `loader` on the ranks that read data, from the file or computed now. Collective.

    Returns the reference's seal. `build_loader` makes the reader of every row that computing them needs. DataError for a
    file of something else, ConfigError for another reference than the run began with.
    """
    box: list = [None]
    if dist.get_rank() == 0:  # the first process reads data
        assert loader is not None
        try:
            key = reference_key(run, loader)
            path = file_of(run, key)
            box = [(path, key, read_log_probs(path, key) if path.exists() else None)]
        except MoELlavaError as error:
            box = [error]
    dist.broadcast_object_list(box, src=0)
    if isinstance(box[0], MoELlavaError):
        raise box[0]
    path, key, found_R2 = box[0]
    if found_R2 is None and not reference_of(run):
        raise ConfigError(
            f"{path} is gone, and with it what {run.checkpoint.save} began with; give checkpoint.load again"
        )
    if found_R2 is None:
        parallel.say(f"computing the log-probabilities of {reference_of(run)} for every pair, once: {path}")
        found_R2 = _compute(run, build_loader)
        _write_together(path, found_R2, key)
    if loader is not None:
        loader.micro_batches.pipeline.reference_R2 = found_R2
    return key["reference"]


def reference_of(run: RunConfig) -> str:
    """The checkpoint that the policy is compared with, as the run names it."""
    return run.preference.reference or run.checkpoint.load or ""


def reference_key(run: RunConfig, loader: Loader) -> dict:
    """What the log-probabilities depend on, as JSON reads it back."""
    key = {
        "reference": reference_seal(run),
        "rows": loader.content,
        "image_aspect_ratio": run.data.image_aspect_ratio,
        "scale_multimodal_embeddings": run.model.scale_multimodal_embeddings,
        "precision": run.training.precision,
    }
    return json.loads(json.dumps(key))


def reference_seal(run: RunConfig) -> str | None:
    """The seal of the reference's run.json. A run that goes on knows it, should the reference itself be gone.

    Raises ConfigError where it goes on with another reference than it began with.
    """
    resumed = newest_described(run.checkpoint.save, run.checkpoint.ckpt_step) if run.checkpoint.save else None
    then = resumed[1].preference.get("reference") if resumed else None
    found = newest_checkpoint(reference_of(run)) if reference_of(run) else None
    now = read_description(found).checksum if found is not None else then
    if then is not None and now != then:
        raise ConfigError(
            f"checkpoint.save={run.checkpoint.save} was trained against the reference of seal {then[:12]}, and "
            f"{reference_of(run)} is another one (seal {str(now)[:12]}); give that reference to go on, or choose another "
            "checkpoint.save"
        )
    return now


def file_of(run: RunConfig, key: dict) -> Path:
    """`preference.log_probs`, or a name of its own beside the first data set."""
    if run.preference.log_probs is not None:
        return Path(run.preference.log_probs).expanduser()
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    first = Path(run.data.sources[0].path).expanduser()
    return first.parent / ".moellava_index" / f"reference-{digest}.safetensors"


def read_log_probs(path: Path, key: dict) -> np.ndarray:
    """fp32 [R, 2]. DataError for a file that is damaged, or of another reference or other rows."""
    try:
        with safe_open(path, framework="numpy") as file:
            there = json.loads((file.metadata() or {})[KEY])
            found_R2 = file.get_tensor(TENSOR)
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise DataError(f"preference.log_probs={path} cannot be read ({error}); remove it to compute it anew") from None
    if there != key:
        differing = sorted(name for name in {*there, *key} if there.get(name) != key.get(name))
        raise DataError(
            f"preference.log_probs={path} is of something else (another {', another '.join(differing)}): log-ratios to it "
            "would mean nothing; name another file, or remove this one to compute it anew"
        )
    return found_R2


def _write_together(path: Path, found_R2: np.ndarray, key: dict) -> None:
    box = [""]
    if dist.get_rank() == 0:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_durably(path, save({TENSOR: found_R2}, {KEY: json.dumps(key, sort_keys=True)}))
        except OSError as error:
            box = [f"cannot write {path} ({error}); name a file that can be written in preference.log_probs"]
    dist.broadcast_object_list(box, src=0)
    if box[0]:
        raise DataError(box[0])


# --- computing --------------------------------------------------------------------------------------------------------


def _compute(run: RunConfig, build_loader: Callable[[RunConfig], Loader]) -> np.ndarray:
    """fp32 [R, 2] on every rank, -inf for rows that cannot be used; the random generators are as before. Collective."""
    with undisturbed([]):
        chunks = model_as_used(run, require_checkpoint(reference_of(run)))
        loader = None
        box: list = [None]
        if parallel.reads_data():
            loader = build_loader(each_row_once(run))
            box = [(loader.rows, loader.rows_per_epoch())]
        dist.broadcast_object_list(box, src=0)
        rows, items = box[0]
        table_R2 = torch.full((rows, 2), -math.inf, dtype=torch.float32)
        passed = passed_once(run, chunks, loader, items, _forward_step, "the reference's log-probabilities")
        for batch, log_probs_P2 in passed:
            table_R2[batch.pairs] = log_probs_P2.cpu()
        table_R2 = platform.on_device(table_R2)
        dist.all_reduce(table_R2, op=dist.ReduceOp.MAX)
        del chunks, loader, passed
        gc.collect()  # the model's hooks hold it: its memory is the policy's
        return table_R2.cpu().numpy()


def _forward_step(batches: Iterator[Batch], model):
    batch = next(batches)
    return model(**model_inputs(batch)), partial(_read, batch)


def _read(batch: Batch, losses_BL: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return losses_BL.new_zeros(1), answer_log_probs(losses_BL, answer_positions(batch))
