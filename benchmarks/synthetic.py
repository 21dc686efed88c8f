"""Samples whose lengths follow LLaVA's 665k mix, scaled down, and trainers that run on them."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from megatron_moellava import parallel
from megatron_moellava.backbones import BACKBONES
from megatron_moellava.config import RunConfig, from_dict
from megatron_moellava.data.batch import Batch, pack
from megatron_moellava.data.encode import IGNORE_INDEX, IMAGE_TOKEN, EncodedSample
from megatron_moellava.data.length_distribution import sample_lengths
from megatron_moellava.data.loader import Batches
from megatron_moellava.data.packing import select_rows
from megatron_moellava.towers import TOWERS
from megatron_moellava.training.loop import Trainer

LONGEST = 2048  # tokens of a sample, and FEATURES of an image, in the mix
FEATURES = 576
PROMPT = 10  # tokens before the picture or the question, without loss
Sample = tuple[EncodedSample, np.ndarray | None]  # and its pixels


@dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """Everything is LLaVA's divided by `divisor`: visual tokens of an image, lengths, rows."""

    divisor: int
    image: int  # pixels; patches of 14
    vocabulary: int

    @property
    def features(self) -> int:
        return FEATURES // self.divisor

    @property
    def seq_length(self) -> int:
        return LONGEST // self.divisor


QUARTER = Scale(divisor=4, image=168, vocabulary=2048)  # 144 visual tokens, rows of 512


def make_samples(count: int, scale: Scale, seed: int = 5) -> list[Sample]:
    """The second half of each text is an answer."""
    assert scale.features == (scale.image // 14) ** 2
    lengths, images = sample_lengths(count, FEATURES, LONGEST, seed=seed)
    rng = np.random.default_rng(seed)
    made = []
    for number, (length, has_image) in enumerate(zip(lengths // scale.divisor, images, strict=True)):
        visual = scale.features if has_image else 0
        text = rng.integers(3, scale.vocabulary - 1, max(int(length) - visual, PROMPT + 4))
        tokens = np.concatenate([text[:PROMPT], np.full(visual, IMAGE_TOKEN), text[PROMPT:]]).astype(np.int64)
        answer = (len(text) - PROMPT) // 2
        labels = np.full(len(tokens), IGNORE_INDEX, dtype=np.int64)
        labels[-answer - 1 : -1] = tokens[-answer:]
        pixels = rng.standard_normal((1, 3, scale.image, scale.image), dtype=np.float32) if has_image else None
        made.append((EncodedSample(id=str(number), tag="", tokens_S=tokens, labels_S=labels), pixels))
    return made


def useful_tokens(samples: list[Sample]) -> int:
    """Those that carry a loss or an image."""
    return sum(int(((s.labels_S != IGNORE_INDEX) | (s.tokens_S == IMAGE_TOKEN)).sum()) for s, _ in samples)


def packed_rows(samples: list[Sample], scale: Scale, seq_length: int | None = None) -> list[Batch]:
    """All samples in rows of `seq_length` (the scale's), chosen as the loader chooses them."""
    seq_length = seq_length or scale.seq_length
    waiting, rows = list(samples), []
    while waiting:
        chosen, left = select_rows([len(sample) for sample, _ in waiting], seq_length)
        for row in chosen:
            part = [waiting[i] for i in row]
            pixels = [pixels for _, pixels in part if pixels is not None]
            rows.append(pack([s for s, _ in part], pixels, seq_length, 0, (3, scale.image, scale.image)))
        waiting = [waiting[i] for i in left]
    return rows


class Repeated(Batches):
    """A loader that gives the rows of one data-parallel rank again and again."""

    def __init__(self, rows: list[Batch]):
        self.rows = self._forever(rows)

    def _forever(self, rows: list[Batch]) -> Iterator[Batch]:
        while True:
            yield from rows

    def __next__(self) -> Batch:
        return next(self.rows)

    def state_dict(self) -> dict:
        return {}


def trainer_of(run: RunConfig, rows: list[Batch]) -> Trainer:
    """A trainer of this rank that repeats its share of the rows; the process groups are made here."""
    parallel.initialize(run.parallel, run.training.seed)
    share = rows[parallel.data_parallel_rank() :: parallel.data_parallel_size()]
    trainer = Trainer(run, Repeated(share) if parallel.reads_data() else None, 1000)
    for wrapped in trainer.wrapped:
        wrapped.train()
    return trainer


def register_model(name: str, scale: Scale, *, hidden: int, layers: int, ffn: int) -> None:
    """A Llama and a CLIP tower of this size under `name`."""
    BACKBONES[name] = replace(
        BACKBONES["llama-tiny"],
        name=name,
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=hidden // 64,
        num_query_groups=hidden // 64,
        kv_channels=64,
        vocab_size=scale.vocabulary,
        max_position_embeddings=scale.seq_length,
    )
    TOWERS[name] = replace(TOWERS["clip-tiny"], name=name, image_size=scale.image, patch_size=14)


def run_config(
    name: str,
    scale: Scale,
    rows: int,
    *,
    moe: bool | dict,
    layout: dict | None = None,
    trains: list[str] | None = None,
    vision: dict | None = None,
    **optimizer,
) -> RunConfig:
    """Stage 3 with four experts in every other layer (`moe`: fields that differ), or stage 2. `vision`: the experts of tower
    and projector."""
    tree = {
        "model": {"backbone": name, "tower": name},
        "data": {"seq_length": scale.seq_length},
        "training": {"stage": 3 if moe else 2, "precision": "bf16", "global_batch_size": rows, "trains": trains},
        "optimizer": {"lr": 1e-5, **optimizer},
        "logging": {"tensorboard": False, "routing_interval": 1_000_000},
        "parallel": layout or {},
    }
    return from_dict(RunConfig, tree | (vision or {}) | ({"moe": {} if moe is True else moe} if moe else {}))
