"""Short answers without generating: one forward pass tells what greedy decoding would have said.

Greedy decoding reproduces the truth exactly when, with the truth as input, the most likely token at every answer position
is the next one of the truth (its end token included). Where one differs, greedy decoding would have said that token; the
text up to and including it is the prediction. The same pass gives the loss of the truth, which still tells models apart
that answer nearly everything. Questions are packed like training rows. Suffixes: B rows, S positions, L those of a rank, T
tokens of an answer.
"""

import bisect
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from megatron_moellava import parallel
from megatron_moellava.config import DataConfig, DataError
from megatron_moellava.data import media
from megatron_moellava.data.batch import Batch, pack
from megatron_moellava.data.encode import IGNORE_INDEX, EncodedSample
from megatron_moellava.data.encoder import Encoder
from megatron_moellava.data.sample import Sample, parse_record
from megatron_moellava.evaluation.quickstart.names import SEPARATOR
from megatron_moellava.model.answers import token_losses
from megatron_moellava.model.inputs import model_inputs
from megatron_moellava.model.moe_llava import MoELlava
from megatron_moellava.routing.statistics import RoutingStatistics
from megatron_moellava.towers import Tower
from megatron_moellava.training.broadcast import broadcast_batch
from megatron_moellava.training.schedule import ROWS_PER_STAGE, run_schedule


def predict(
    chunks: list[MoELlava],
    encoder: Encoder,
    rows: Sequence[dict],
    image_folder: str | Path,
    *,
    blank: bool = False,
    statistics: RoutingStatistics | None = None,
) -> list[dict]:
    """{"prediction", "loss"} of each row {image, question, answer}, in order, on every rank.

    `prediction` is what greedy decoding answers, `loss` minus the log of the probability of the truth, in nats. A row with
    `answers` besides, whose `answer` is all of them with SEPARATOR between, also gets "parts": the same two of each of them,
    given the true ones before it. `blank`:
    every picture is replaced by the mean colour, to see what the words alone give away. `statistics`: counts which
    experts the tokens go to.
    """
    plan = Plan(encoder, rows, Path(image_folder), blank, chunks[0].tower, chunks[0].run.data)
    mine, counted = plan.of_rank(parallel.data_parallel_rank(), parallel.data_parallel_size())
    source = plan.batches(mine) if parallel.reads_data() else None
    found: dict[int, dict] = {}
    for chunk in chunks:
        chunk.eval()
    for start in range(0, len(mine), at_once := ROWS_PER_STAGE * parallel.num_stages()):
        part = mine[start : start + at_once]
        # Handed out before the pipeline starts: inside it, a later stage waits for the one that would hand out.
        batches = [broadcast_batch(next(source) if source is not None else None) for _ in part]
        observed = [statistics if start + number < counted else None for number in range(len(part))]
        guesses = _guesses(chunks, list(zip(batches, observed, strict=True)), encoder)
        for packed, (guess_S, loss_S) in zip(part, guesses, strict=False):  # no guesses on stages before the last
            found |= plan.read(packed, guess_S.numpy(), loss_S.numpy())
    for chunk in chunks:
        chunk.train()
    everywhere: list[dict | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, found)
    merged = {index: said for part in everywhere if part is not None for index, said in part.items()}
    return [merged[index] for index in range(len(rows))]


@torch.no_grad()
def _guesses(chunks: list[MoELlava], batches: list[tuple], encoder: Encoder) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Likeliest next token and loss of the label [S] of each batch; on the last pipeline stage, others return nothing."""
    return run_schedule(
        partial(_forward_step, encoder.tokenizer.vocab_size),
        chunks,
        batches,
        seq_length=encoder.max_length,
        micro_batch_size=1,
        forward_only=True,
    )


def _forward_step(vocab_size: int, batches: Iterator[tuple[Batch, RoutingStatistics | None]], model):
    batch, statistics = next(batches)
    with statistics.count(batch) if statistics else nullcontext():
        logits = model(**(model_inputs(batch) | {"labels_BS": None}))

    def read(logits_BLV: torch.Tensor):
        losses_BS, guesses_BS = token_losses(batch.labels_BS, logits_BLV, vocab_size)
        return torch.zeros(1), (guesses_BS[0].cpu(), losses_BS[0].cpu())

    return logits, read


@dataclass(slots=True)
class Plan:
    """Which questions share which packed row."""

    encoder: Encoder
    rows: Sequence[dict]
    image_folder: Path
    blank: bool
    tower: Tower
    data: DataConfig

    def of_rank(self, rank: int, size: int) -> tuple[list[list[tuple[int, EncodedSample]]], int]:
        """(packed rows of one data-parallel rank, how many of them are its own).

        Every rank gets equally many, since experts meet across ranks, and a multiple of the pipeline's stages: further
        rows are repeated ones.
        """
        packed: list[list[tuple[int, EncodedSample]]] = [[]]
        space = self.encoder.max_length
        for index, row in enumerate(self.rows):
            if row.get("answers") and SEPARATOR.join(row["answers"]) != row["answer"]:
                raise DataError(
                    f"question {index}: answer is not its answers with {SEPARATOR!r} between; write both alike"
                )
            sample = self._encoded(parse_record(_record(index, row), origin=f"question {index}"))
            if len(sample) > space:
                packed.append([])
                space = self.encoder.max_length
            packed[-1].append((index, sample))
            space -= len(sample)
        total = len(packed) + -len(packed) % (size * parallel.num_stages())
        own = len(packed[rank::size])
        return [packed[number % len(packed)] for number in range(rank, total, size)], own

    def _encoded(self, sample: Sample) -> EncodedSample:
        if not (self.tower.has_grids or self.tower.takes_videos):
            return self.encoder(sample)
        return media.encoded(self.encoder, sample, str(self.image_folder), sample.origin, self.tower, self.data)

    def batches(self, packed: list[list[tuple[int, EncodedSample]]]) -> Iterator[Batch]:
        """One packed batch for each row of `packed`, its pictures read or blank."""
        shape = self.tower.pixel_shape
        for row in packed:
            samples = [sample for _, sample in row]
            pixels = [part for sample in samples for part in self._pixels(sample)]
            yield pack(samples, pixels, self.encoder.max_length, self.encoder.tokenizer.pad_id, shape)

    def _pixels(self, sample: EncodedSample) -> list[np.ndarray]:
        folder = str(self.image_folder)
        if self.blank:
            counts = [self._count(grid) for grid in sample.grids] or [1] * len(sample.images)
            return [np.zeros((count, *self.tower.pixel_shape), dtype=np.float32) for count in counts]
        if self.tower.has_grids:
            return [found for found, _ in media.pixels_of(sample, folder, "question", self.tower, self.data)]
        return [media.pixels(ref, folder, "question", self.tower, "pad")[0][None] for ref in sample.images]

    def _count(self, grid: tuple[int, ...]) -> int:
        """Patches at native resolution; else tiles, overview included."""
        return grid[0] * grid[1] if self.tower.native else 1 + grid[0] * grid[1]

    def read(self, packed: list[tuple[int, EncodedSample]], guess_S: np.ndarray, loss_S: np.ndarray) -> dict[int, dict]:
        """Predictions and losses of the questions in one packed row."""
        found, start = {}, 0
        for index, sample in packed:
            answer = sample.labels_S != IGNORE_INDEX
            here = slice(start, start + len(sample))
            truth, guess = sample.labels_S[answer], guess_S[here][answer]
            wrong = np.flatnonzero(truth != guess)
            said = truth[:-1] if not len(wrong) else guess[: wrong[0] + 1]
            text = self.encoder.tokenizer.decode([int(token) for token in said]).strip()
            loss = loss_S[here][answer]
            found[index] = {"prediction": text, "loss": float(loss.sum())}
            if answers := self.rows[index].get("answers"):
                found[index]["parts"] = self._parts(answers, truth, guess, loss)
            start += len(sample)
        return found

    def _parts(
        self, answers: Sequence[str], truth_T: np.ndarray, guess_T: np.ndarray, loss_T: np.ndarray
    ) -> list[dict]:
        """{"prediction", "loss"} of each of the answers that `truth_T` is the tokens of; separators belong to what they end."""
        decode = self.encoder.tokenizer.decode
        ends_T = [len(decode(truth_T[: n + 1].tolist()).lstrip()) for n in range(len(truth_T))]  # in characters
        parts, first, end = [], 0, 0
        for answer in answers:
            end += len(answer) + len(SEPARATOR)
            last = bisect.bisect_right(ends_T, end)
            here = slice(first, last)
            right = (truth_T[here] == guess_T[here]).all()
            said = answer if right else decode(guess_T[here].tolist()).strip(SEPARATOR)
            parts.append({"prediction": said, "loss": float(loss_T[here].sum())})
            first = last
        return parts


def _record(index: int, row: dict) -> dict:
    turns = [{"from": "human", "value": f"<image>\n{row['question']}"}, {"from": "gpt", "value": row["answer"]}]
    return {"id": str(index), "image": row["image"], "conversations": turns}
