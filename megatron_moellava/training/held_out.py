"""Losses on held-out data while training: the same under any layout, and without a trace in the training itself.

Every validation reads the same rows: all of a source, or its first `validation.steps` batches in an order of its own.
What a rank lacks to a whole number of micro-batches it fills with rows whose labels do not count.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron_moellava import parallel, platform
from megatron_moellava.config import DataError, RunConfig
from megatron_moellava.data.batch import Batch, from_wire
from megatron_moellava.data.encode import IGNORE_INDEX
from megatron_moellava.data.loader import Loader
from megatron_moellava.model.answers import token_losses
from megatron_moellava.model.inputs import model_inputs
from megatron_moellava.training.broadcast import broadcast_batch
from megatron_moellava.training.one_pass import dealt_once, read_together
from megatron_moellava.training.schedule import run_schedule

from megatron.core.tensor_parallel import get_cuda_rng_tracker

SHORT_ANSWER = 8  # tokens, the end of the answer among them: of a closed question, whose answer is right or wrong


@dataclass(frozen=True, slots=True)
class Score:
    """Of one source: the mean loss of its answers' tokens, and how many of its short answers are right.

    An answer is right when each of its tokens is the likeliest one after those before it, which is when greedy
    generation gives it.
    """

    name: str
    loss: float  # nats per token
    tokens: int
    right: int
    short_answers: int

    def numbers(self) -> dict[str, float]:
        """For a log."""
        accuracy = {"accuracy": self.right / self.short_answers} if self.short_answers else {}
        return {"loss": self.loss, "tokens": self.tokens, "short_answers": self.short_answers} | accuracy


class HeldOut:
    """The sources of `validation.sources` on this rank."""

    def __init__(self, run: RunConfig, loaders: dict[str, Loader] | None):
        """`loaders` by the name of their source, on the processes that read data; None elsewhere. Collective."""
        self.run, self.loaders = run, loaders
        self.num_microbatches = run.num_microbatches(parallel.data_parallel_size())
        box: list = [None]
        if loaders is not None:
            (vocab_size,) = {loader.micro_batches.pipeline.encoder.tokenizer.vocab_size for loader in loaders.values()}
            box = [(vocab_size, {name: loader.rows_per_epoch() for name, loader in loaders.items()})]
        dist.broadcast_object_list(box, src=0)  # the first process reads data
        self.vocab_size, rows = box[0]
        self.steps = {name: self._steps(items) for name, items in rows.items()}

    def _steps(self, items: int) -> int:
        """Batches of `global_batch_size` rows that a source fills."""
        steps = math.ceil(items / self.run.training.global_batch_size)
        return min(steps, self.run.validation.steps or steps)

    def __call__(self, wrapped: list[torch.nn.Module]) -> list[Score]:
        """Scores of all sources, on every rank; collective. Raises DataError for a row that cannot be read."""
        with undisturbed(wrapped):
            return [self._score(name, wrapped) for name in self.steps]

    def _score(self, name: str, wrapped: list[torch.nn.Module]) -> Score:
        reader = self._micro_batches(name) if self.loaders is not None else None
        sums_4 = torch.zeros(4, dtype=torch.float64)
        for _ in range(self.steps[name]):
            read = read_together(reader, self.num_microbatches, f"validation source {name}")
            batches = [broadcast_batch(batch) for batch in read]
            found = run_schedule(
                partial(_forward_step, self.vocab_size),
                wrapped,
                batches,
                seq_length=self.run.data.seq_length,
                micro_batch_size=self.run.training.micro_batch_size,
                forward_only=True,
            )
            for found_4 in found:
                sums_4 += found_4.cpu()
        if not parallel.speaks_for_its_replicas():
            sums_4.zero_()
        loss, tokens, right, short_answers = parallel.sum_floats_over_ranks(sums_4.tolist())
        return Score(name, loss / max(tokens, 1.0), int(tokens), int(right), int(short_answers))

    def _micro_batches(self, name: str) -> Iterator[Batch]:
        """This data-parallel rank's; those of a step are dealt as training deals them."""
        assert self.loaders is not None
        count, size = self.steps[name] * self.num_microbatches, self.run.training.micro_batch_size
        for rows, delivered in dealt_once(self.loaders[name], count, size):
            if delivered["events"].skipped:
                reason, message, _ = delivered["events"].skipped[0]
                raise DataError(f"{message} ({reason}); validation reads every row, so mend it or leave it out")
            yield _counting(from_wire(delivered["batch"]), rows)


@contextlib.contextmanager
def undisturbed(wrapped: list[torch.nn.Module]) -> Iterator[None]:
    """Evaluation, after which every generator and mode is as it was."""
    state, tracker = platform.rng_state(), get_cuda_rng_tracker()
    streams = tracker.get_states()
    for chunk in wrapped:
        chunk.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for chunk in wrapped:
            chunk.train()
        tracker.set_states(streams)
        platform.set_rng_state(state)


def _counting(batch: Batch, rows: int) -> Batch:
    """The batch, of which the first `rows` count."""
    labels_BS = batch.labels_BS.clone()
    labels_BS[rows:] = IGNORE_INDEX
    return replace(batch, labels_BS=labels_BS)


def _forward_step(vocab_size: int, batches: Iterator[Batch], model):
    batch = next(batches)

    def read(logits_BLV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        losses_BS, guesses_BS = token_losses(batch.labels_BS, logits_BLV, vocab_size)
        is_right_BS = guesses_BS == batch.labels_BS
        return losses_BS.new_zeros(1), answer_sums(losses_BS, is_right_BS, batch.labels_BS != IGNORE_INDEX)

    return model(**(model_inputs(batch) | {"labels_BS": None})), read


def answer_sums(losses_BS: torch.Tensor, is_right_BS: torch.Tensor, is_answer_BS: torch.Tensor) -> torch.Tensor:
    """fp64 [4]: sum of the losses, tokens, short answers all of whose tokens are right, short answers.

    >>> is_answer [0 1 1 0 1], is_right [0 1 1 0 0] -> two short answers, of which one is right
    """
    starts_BS = is_answer_BS & ~F.pad(is_answer_BS[:, :-1], (1, 0))
    answer_N = starts_BS.flatten().cumsum(0)[is_answer_BS.flatten()] - 1  # whose token it is
    most = is_answer_BS.numel()
    length_A = torch.bincount(answer_N, minlength=most)
    right_A = torch.bincount(answer_N, weights=is_right_BS[is_answer_BS].double(), minlength=most)
    is_short_A = (length_A > 0) & (length_A <= SHORT_ANSWER)
    counts = [is_answer_BS.sum(), (is_short_A & (right_A == length_A)).sum(), is_short_A.sum()]
    return torch.stack([losses_BS.double().sum(), *(count.double() for count in counts)])
