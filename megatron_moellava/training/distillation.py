"""The objective of a run with a teacher: of each label the divergence from the teacher's distribution, beside the label's loss.

Both distributions are seen through the teacher's K likeliest tokens and one outcome for all others (`model/vocabulary.py`):
with K the whole vocabulary the divergence is that of the full distributions, with fewer it is less, never more. Where a
temperature flattens them it flattens these C = K + 1 outcomes, of which everything is known at any temperature.

Suffixes: B rows, S positions, L those of this context-parallel rank, T labels, K tokens, C outcomes, V vocabulary of this rank.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
import torch.distributed as dist

from megatron_moellava import parallel
from megatron_moellava.checkpoint.resume_point import newest_described
from megatron_moellava.config import ConfigError, DataError, DistillationConfig, RunConfig
from megatron_moellava.data.batch import Batch, Counts
from megatron_moellava.data.encode import IGNORE_INDEX
from megatron_moellava.data.loader import LATER, Loader
from megatron_moellava.data.teacher_logits import label_key, open_teacher
from megatron_moellava.model.context_parallel import share
from megatron_moellava.model.vocabulary import logits_of, with_rest
from megatron_moellava.training.one_pass import raise_together


def divergence(teacher_TC: torch.Tensor, student_TC: torch.Tensor, temperature: float) -> torch.Tensor:
    """[T]: KL(teacher, student) in nats of logits, both flattened by the temperature, times its square.

    The square keeps the gradient's size (Hinton et al., arXiv 1503.02531, section 2). What the teacher gives no probability
    costs nothing.
    """
    teacher_TC = (teacher_TC.float() / temperature).log_softmax(dim=1)
    student_TC = (student_TC / temperature).log_softmax(dim=1)
    probs_TC = teacher_TC.exp()
    difference_TC = (teacher_TC - student_TC).masked_fill(probs_TC == 0, 0.0)
    return temperature**2 * (probs_TC * difference_TC).sum(dim=1)


def places_of_labels(batch: Batch) -> torch.Tensor:
    """int64 [T]: where in the flattened [B, L] of this context-parallel rank there are labels.

    How many there are in whole rows the host knows, so that it need not wait for the device.
    """
    is_label_X = (share(batch.labels_BS) != IGNORE_INDEX).flatten()
    if parallel.context_parallel_size() == 1:
        return is_label_X.nonzero_static(size=batch.counts.loss_tokens)[:, 0]
    return is_label_X.nonzero()[:, 0]


def of_labels(batch: Batch, places_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """([T] labels, int64 [T, K] and [T, C] what the teacher says of them) at these places of this context-parallel rank."""
    assert batch.teacher_ids_TK is not None and batch.teacher_log_probs_TC is not None, "the loader has a teacher"
    order_BS = (batch.labels_BS != IGNORE_INDEX).flatten().cumsum(0).view_as(batch.labels_BS) - 1
    own_T = share(order_BS).flatten()[places_T]
    return (
        share(batch.labels_BS).flatten()[places_T],
        batch.teacher_ids_TK[own_T].long(),
        batch.teacher_log_probs_TC[own_T],
    )


@dataclass(frozen=True, slots=True)
class DistillationLoss:
    """The loss of one step's micro-batches."""

    options: DistillationConfig
    counts: Counts  # of the global batch
    scale: float  # Megatron-Core averages over micro-batches and ranks: their number
    # What a step reports, means over its labels: what is trained, the label's loss, the divergence.
    names: ClassVar[tuple[str, ...]] = ("loss", "ce_loss", "kl_loss")
    inputs: ClassVar[dict] = {"labels_BS": None, "gather_logits": False}  # of the model: it is to return logits

    def __call__(self, logits_BLV: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """(loss for the schedule, fp32 [names] of which the sum over micro-batches and ranks is the step's)."""
        places_T = places_of_labels(batch)
        labels_T, ids_TK, teacher_TC = of_labels(batch, places_T)
        logits_TV = logits_BLV.flatten(0, 1)[places_T]  # few of the positions: these alone become fp32
        student_TC = with_rest(logits_TV, ids_TK)
        label_T = logits_of(logits_TV, labels_T[:, None])[:, 0]
        of_token = 1 / max(self.counts.loss_tokens, 1)
        ce = (student_TC.logsumexp(dim=1) - label_T).sum() * of_token
        kl = divergence(teacher_TC, student_TC, self.options.temperature).sum() * of_token
        loss = (1 - self.options.weight) * ce + self.options.weight * kl
        return loss * self.scale, torch.stack([loss, ce, kl]).detach()


def give_teacher(run: RunConfig, loader: Loader | None) -> str:
    """Have `loader` bring the teacher's logits with its rows, on the ranks that read data. Collective.

    Returns their digest. DataError where they are of other rows or another tokenizer, ConfigError where the run began with
    others.
    """
    assert run.training.distillation is not None
    folder, digest = Path(run.training.distillation.teacher_logits).expanduser(), [""]
    fault: str | None = None
    if loader is not None:
        assert loader.content is not None
        pipeline = loader.micro_batches.pipeline
        try:
            key = label_key(loader.content, LATER)
            pipeline.teacher = open_teacher(folder, key, pipeline.encoder.tokenizer.vocab_size)
            digest = [pipeline.teacher.description.digest]
        except DataError as error:
            fault = str(error)
    raise_together(fault)
    dist.broadcast_object_list(digest, src=0)  # the first process reads data
    resumed = newest_described(run.checkpoint.save, run.checkpoint.ckpt_step) if run.checkpoint.save else None
    then = resumed[1].distillation.get("teacher") if resumed else None
    if then not in (None, digest[0]):
        raise ConfigError(
            f"checkpoint.save={run.checkpoint.save} was trained with the teacher's logits of digest {then[:12]}, and "
            f"training.distillation.teacher_logits={folder} holds others ({digest[0][:12]}); give those to go on, or choose "
            "another checkpoint.save"
        )
    return digest[0]
