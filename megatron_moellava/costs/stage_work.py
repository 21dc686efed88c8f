"""What the ranks of a pipeline compute for one micro-batch: the products of `flops.py`, gathered over the layers held."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_moellava.costs.flops import (
    CAUSAL,
    Product,
    Work,
    first_stage_work,
    last_stage_work,
    layer_work,
    tower_layers_work,
    useful_flops,
    ways,
)
from megatron_moellava.costs.layout import Layout

# Parts of a decoder layer that each recomputation computes again; None: all of it.
RECOMPUTED: dict[str, tuple[str, ...] | None] = {
    "none": (),
    "selective": ("core attention",),
    "moe_act": (),
    "moe": ("core attention", "router", "experts", "shared experts"),
    "full": None,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """What one micro-batch holds on average (memory plans for the fullest instead)."""

    tokens: float  # positions computed, padding included
    length: float  # of a sample: how far attention reaches back
    images: float  # that the tower encodes: pictures, tiles, frames; at native resolution in largest pictures
    samples: float
    reach: float | None = None  # rows of the tower that a row attends to; None: those of the largest picture
    # of each modality with a tower or a projector of its own, beside `images`; None: as many of each
    apart: tuple[float, ...] | None = None

    @property
    def pictures(self) -> tuple[float, float | None, tuple[float, ...] | None]:
        """What the towers have to do: the last arguments of `stage_work`."""
        return self.images, self.reach, self.apart


def decoder_work(layout: Layout, pipeline_rank: int, tokens: float, length: float) -> Iterator[Work]:
    """All decoder layers of a pipeline rank; layers of one kind do the same."""
    for is_moe, count in Counter(layout.kinds_of(pipeline_rank)).items():
        yield from list(layer_work(layout, is_moe, tokens, length)) * count


def recomputed_work(
    layout: Layout,
    pipeline_rank: int,
    tokens: float,
    length: float,
    images: float,
    reach: float | None = None,
    apart: Sequence[float] | None = None,
) -> Iterator[Work]:
    """What the backward pass of one micro-batch computes again."""
    if pipeline_rank == 0 and layout.run.training.recompute_tower and "tower" in layout.backpropagates:
        for tower, count, reached in ways(layout, images, reach, apart):
            yield from tower_layers_work(layout, count, reached, tower)
    parts = RECOMPUTED[layout.run.training.recompute]
    for work in decoder_work(layout, pipeline_rank, tokens, length):
        if parts is None or work.part in parts:
            yield work


def stage_work(
    layout: Layout,
    pipeline_rank: int,
    tokens: float,
    length: float,
    images: float,
    reach: float | None = None,
    apart: Sequence[float] | None = None,
) -> Iterator[Work]:
    """Everything that one pipeline rank computes for one micro-batch, recomputation apart."""
    if pipeline_rank == 0:
        yield from first_stage_work(layout, images, reach, apart)
    yield from decoder_work(layout, pipeline_rank, tokens, length)
    if pipeline_rank == layout.pp - 1:
        yield from last_stage_work(layout, tokens)


def model_flops(layout: Layout, load: Load, causal: float = CAUSAL) -> float:
    """FLOPs that one micro-batch needs on all its model-parallel ranks together: forward, gradients of activations, and
    gradients of what is trained. Recomputation and attention above the diagonal do not count."""
    total = 0.0
    for rank in range(layout.pp):
        for work in stage_work(layout, rank, load.tokens, load.length, *load.pictures):
            # Routed tokens of all tensor ranks are the whole; the router's rows are split too.
            copies = work.copies if isinstance(work, Product) else 1
            total += useful_flops(work, causal) * layout.tp / copies
    return total
