"""Where the tokens of a data set go, token by token: one forward pass per sample, as if each had come alone.

Shapes: T tokens of all samples, L MoE layers, K choices, E experts, M modalities (text, image, those of the run).
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from megatron_moellava import parallel, platform
from megatron_moellava.config import Component, ConfigError, DataError
from megatron_moellava.data import media
from megatron_moellava.data.batch import Batch, pad
from megatron_moellava.data.encode import EncodedSample
from megatron_moellava.data.loader import build_encoder
from megatron_moellava.data.native import whole
from megatron_moellava.data.quantities import PLAIN
from megatron_moellava.data.rows import read_rows
from megatron_moellava.data.sample import BadSample, parse_record
from megatron_moellava.inference.prompts import Prompter
from megatron_moellava.model.inputs import model_inputs
from megatron_moellava.model.moe_llava import MoELlava
from megatron_moellava.routing.records import routing_record
from megatron_moellava.routing.statistics import RoutingStatistics
from megatron_moellava.routing.token_groups import MODALITIES, token_modalities
from megatron_moellava.routing.token_weights import TokenWeights
from megatron_moellava.towers.branches import tower_for
from megatron_moellava.training.broadcast import broadcast_batch

NONE = -1  # in place of a choice that was dropped


@dataclass(frozen=True, slots=True)
class Picture:
    """A sample's first picture of a modality as the model sees it, and the first choice of each of its visual tokens."""

    name: str
    question: str
    pixels_HWC: np.ndarray  # uint8
    first_LF: np.ndarray  # int16, F visual tokens
    columns: int = 0  # visual tokens in a line; 0: they are a square
    modality: str = PLAIN


@dataclass(frozen=True, slots=True)
class Routes:
    """The choices of every token, and what the observer summed up over all of them."""

    layers: tuple[int, ...]  # decoder layers with experts, from 0
    num_experts: int
    topk: int
    choices_TLK: np.ndarray  # int16, best first
    modality_T: np.ndarray  # int64, number of each token's modality
    record: dict  # `routing.records.routing_record`
    counts_LME: np.ndarray  # by decoder layer, dense ones included
    pictures: tuple[Picture, ...]
    num_samples: int
    skipped: tuple[str, ...]  # what was wrong with rows that could not be used
    modalities: tuple[str, ...] = MODALITIES
    vision: dict[Component, dict] = field(
        default_factory=dict
    )  # records of the tower's and the projector's experts, if they have some

    @property
    def is_image_T(self) -> np.ndarray:
        """bool: of a picture of any modality."""
        return self.modality_T > 0

    @property
    def first_by_modality(self) -> dict[str, np.ndarray]:
        """The first choices of the tokens of each modality that there are."""
        parts = {name: self.first_TL[self.modality_T == number] for number, name in enumerate(self.modalities)}
        return {name: first_TL for name, first_TL in parts.items() if len(first_TL)}

    @property
    def first_TL(self) -> np.ndarray:
        """The first choice of each token in each MoE layer."""
        return self.choices_TLK[:, :, 0]


@dataclass(frozen=True, slots=True)
class Question:
    """A sample that is ready for the model."""

    encoded: EncodedSample
    pixels: list[np.ndarray]  # of each picture: [N, 3, H, W]
    text: str


def collect_routes(
    model: MoELlava, prompter: Prompter, data: Sequence[tuple[str, str]], *, limit: int, pictures: int
) -> Routes:
    """`data`: (LLaVA JSON or JSONL, image folder); `limit`: samples in all, 0: every one. The same on all ranks.

    Data-parallel ranks share the samples; ranks that share experts run equally many forward passes.
    Raises ConfigError for a dense model or a pipeline, DataError when no sample can be used.
    """
    if parallel.num_stages() > 1:
        raise ConfigError(
            "parallel.pipeline_model_parallel_size must be 1 for an analysis; use tensor or expert parallelism"
        )
    token_weights, statistics = TokenWeights(model), RoutingStatistics([model])
    if not token_weights.layers:
        raise ConfigError(
            "the checkpoint's language model is dense: it has no routers; give one made by stage 3 or by upcycling"
        )
    vision = {part: RoutingStatistics([model], part) for part in model.run.mixtures if part != "language"}
    rank, size = parallel.data_parallel_rank(), parallel.data_parallel_size()
    questions, skipped = _questions(prompter, data, limit)
    mine = questions[rank::size]
    parts: list = []
    shown: list = []
    for number in range(-(-len(questions) // size)):  # the last round may repeat, so that shared experts are met
        counted = number < len(mine)
        batch = broadcast_batch(_batch(mine[number if counted else 0], prompter)) if mine else _nothing(prompter)
        choices_TLK = _forward(model, batch, token_weights, [statistics, *vision.values()] if counted else [])
        if counted:
            modality_T = token_modalities(batch, statistics.modalities)[0].cpu().numpy()
            parts.append((choices_TLK, modality_T))
            if len(shown) < pictures:
                shown += _pictures(mine[number], model, choices_TLK[modality_T > 0, :, 0])
    sums = statistics.collect()
    vision_records: dict[Component, dict] = {
        part: routing_record(counted.collect()) for part, counted in vision.items()
    }
    gathered = _gathered((parts, shown))
    parts = [part for rank_parts, _ in gathered for part in rank_parts]
    if not parts:
        raise DataError("no sample could be used: " + "; ".join(skipped[:3]))
    return Routes(
        layers=sums.layers,
        num_experts=sums.num_experts,
        topk=sums.topk,
        choices_TLK=np.concatenate([choices for choices, _ in parts]),
        modality_T=np.concatenate([modality for _, modality in parts]),
        record=routing_record(sums),
        counts_LME=sums.choices_LME.numpy(),
        pictures=tuple(picture for _, rank_shown in gathered for picture in rank_shown)[:pictures],
        num_samples=len(questions),
        skipped=tuple(skipped),
        modalities=statistics.modalities,
        vision=vision_records,
    )


def _questions(prompter: Prompter, data: Sequence[tuple[str, str]], limit: int) -> tuple[list[Question], list[str]]:
    encoder = build_encoder(prompter.data, prompter.tokenizer, prompter.tower, prompter.template.version)
    found: list[Question] = []
    skipped: list[str] = []
    for path, folder in data:
        for row, record in read_rows(path):
            if limit and len(found) == limit:
                return found, skipped
            try:
                found.append(
                    _question(record, folder or str(Path(path).parent), f"{path} row {row}", encoder, prompter)
                )
            except BadSample as error:
                skipped.append(str(error))
    return found, skipped


def _question(record, folder: str, where: str, encoder, prompter: Prompter) -> Question:
    if isinstance(record, BadSample):
        raise record
    tower, data = prompter.tower, prompter.data
    sample = parse_record(
        as_conversation(record),
        origin=where,
        max_images=data.max_images,
        ignore_keys=data.ignore_keys,
        frames=partial(media.frame_texts, folder=folder, where=where, data=data),
        modalities=data.modalities,
    )
    sample = media.write_regions(sample, folder, tower, data)
    encoded = media.encoded(encoder, sample, folder, where, tower, data)
    kept = [pixels for pixels, _ in media.pixels_of(encoded, folder, where, tower, data)]
    return Question(encoded, kept, sample.turns[0].text.replace("<image>", "").strip())


def as_conversation(record: dict) -> dict:
    """A row of closed questions {image, question, answer, type} as a LLaVA record; other rows as they are."""
    if not isinstance(record, dict) or "conversations" in record or "question" not in record:
        return record
    image = {"image": record["image"]} if record.get("image") else {}
    text = f"<image>\n{record['question']}" if image else record["question"]
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": str(record.get("answer", ""))}]
    return {"id": str(record.get("question_id", "")), "conversations": turns, "tag": record.get("type", "")} | image


def _batch(question: Question, prompter: Prompter) -> Batch | None:
    if not parallel.reads_data():
        return None
    return pad([question.encoded], question.pixels, 1, prompter.tokenizer.pad_id, prompter.tower.pixel_shape)


def _nothing(prompter: Prompter) -> Batch:
    """For a rank without any sample: one token, so that it meets the others at the experts."""
    sample = EncodedSample(id="", tag="", tokens_S=np.array([prompter.tokenizer.eos_id]), labels_S=np.array([-100]))
    return broadcast_batch(pad([sample], [], 1, prompter.tokenizer.pad_id, prompter.tower.pixel_shape))


@torch.no_grad()
def _forward(
    model: MoELlava, batch: Batch, token_weights: TokenWeights, statistics: Sequence[RoutingStatistics]
) -> np.ndarray:
    """[T, L, K]"""
    model.eval()
    with ExitStack() as stack:
        stack.enter_context(token_weights.recording())
        for counting in statistics:
            stack.enter_context(counting.count(batch))
        model(**(model_inputs(batch) | {"labels_BS": None}))
    topk = model.config.moe_router_topk
    return np.stack([first_choices(token_weights.weights_TE[layer], topk) for layer in token_weights.layers], axis=1)


def first_choices(weights_TE: torch.Tensor, topk: int) -> np.ndarray:
    """int16 [T, K] by falling weight; NONE where a choice was dropped."""
    weights_TK, experts_TK = weights_TE.topk(topk, dim=-1)
    return experts_TK.masked_fill(weights_TK <= 0, NONE).numpy().astype(np.int16)


def _pictures(question: Question, model: MoELlava, first_RL: np.ndarray) -> Iterator[Picture]:
    """The first tile of the first picture of each modality. `first_RL`: the first choices of the visual tokens."""
    encoded = question.encoded
    starts = [0, *accumulate(encoded.features)]
    seen: set[str] = set()
    for number, (ref, pixels_NCHW) in enumerate(zip(encoded.images, question.pixels, strict=True)):
        modality = ref.modality.name if ref.modality else PLAIN
        if modality in seen:
            continue
        seen.add(modality)
        tower = tower_for(ref.modality, model.tower)
        rows, columns = encoded.grids[number] if tower.native else (0, 0)
        # Those of the overview where there are tiles; pooled frames and pictures at native resolution have fewer.
        count = min(encoded.features[number], tower.num_features)
        scale, shift = (np.array(values)[:, None, None] for values in (tower.image_std, tower.image_mean))
        first_CHW = whole(pixels_NCHW, (rows, columns)) if tower.native else pixels_NCHW[0]
        pixels_CHW = (first_CHW * scale + shift).clip(0, 1)
        yield Picture(
            name=encoded.id,
            question=question.text,
            pixels_HWC=(pixels_CHW * 255).round().astype(np.uint8).transpose(1, 2, 0),
            first_LF=first_RL[starts[number] : starts[number] + count].T,
            columns=columns // tower.shuffle,
            modality=modality,
        )


def _gathered(mine) -> list:
    """Of the ranks that hold samples of their own, in the order of the data."""
    everywhere: list = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, mine if parallel.reads_data() else None)
    platform.synchronize()
    return [part for part in everywhere if part is not None]
