"""How even the work of data-parallel ranks is where pictures differ in what they cost: no model runs, costs are FLOPs.

native ...   samples of the 665k law with pictures at native resolution, of usual sizes (COCO, Visual Genome, book covers,
             TextCaps)
videos ...   the same samples with CLIP's 576 tokens a picture; a fifth of them are videos instead, pooled 2x2x2

Stage 2 of Phi-2 with a frozen tower. Rows sorted by cost are what the loader makes, by attention alone is what it would make
without knowing the tower's work. Of one row per rank, taken in turn; and of steps of several, dealt by cost, longest first.
"""

import math

import numpy as np

from megatron_moellava.backbones import get_backbone
from megatron_moellava.config import DataConfig, ModelConfig, RunConfig, TrainingConfig
from megatron_moellava.costs.balance import WITH_GRADIENTS, tower_weight
from megatron_moellava.costs.flops import CAUSAL, Product, last_stage_work, layer_work, useful_flops
from megatron_moellava.costs.sharding import Sharding
from megatron_moellava.data.dealing import deal
from megatron_moellava.data.length_distribution import sample_lengths
from megatron_moellava.data.native import plans
from megatron_moellava.data.packing import pack_epoch
from megatron_moellava.towers import POOLINGS, tower_of_run

RANKS = 8
ROUNDS = 4  # rows of each rank in a step that is dealt
LONGEST = 2048  # tokens of a sample, as in the original
BUFFER = 128  # samples that the packer sees
NATIVE = "siglip2-so400m-patch16-naflex@pixel_shuffle"
NATIVE_LAWS = ((4096, 256, True), (4096, 256, False), (4096, 1024, False))  # tokens per row, per picture, enlarged
PICTURES = (  # width, height
    *[(640, 480), (480, 640), (640, 427), (500, 375), (375, 500)] * 4,
    *[(800, 600), (1024, 768), (500, 333), (1280, 960)] * 2,
    *[(330, 500), (400, 600), (260, 400)],
    *[(1024, 683), (768, 1024)],
)
VIDEOS = 0.2  # share of the samples with a picture
FRAMES = (8, 24)  # fewest and most of a video
POOLED = "2x2x2"


def balance_figures() -> dict:
    """All figures, by name."""
    report = {}
    for law in NATIVE_LAWS:
        report |= native_figures(*law)
    return report | video_figures(4096)


def native_figures(seq_length: int, budget: int, enlarge: bool) -> dict:
    """Busiest rank over the mean of RANKS ranks per step, of the tower's work and of everything that a row costs."""
    run = run_of(NATIVE, DataConfig(seq_length=seq_length, max_image_tokens=budget, enlarge_images=enlarge))
    tower = tower_of_run(run)
    text, has_image = sample_lengths(3000 * RANKS, 0, LONGEST - budget)
    drawn = np.random.default_rng(1).integers(0, len(PICTURES), len(text))
    planned = {number: plans([size], tower, run.data, "")[0] for number, size in enumerate(PICTURES)}
    visual = np.array([planned[number].tokens for number in drawn]) * has_image
    work = np.array([tower.work(math.prod(planned[number].grid)) for number in drawn]) * has_image
    name = f"native {seq_length} tokens, {budget} per picture{'' if enlarge else ' at most'}"
    found = {f"{name}/visual tokens of a picture, mean": round(float(visual[has_image > 0].mean()), 1)}
    return found | compared(run, text + visual, work, name)


def video_figures(seq_length: int) -> dict:
    """The same where pictures have CLIP's tokens, and videos an eighth of them for each frame."""
    run = run_of("clip-vit-large-patch14-336", DataConfig(seq_length=seq_length, video_pooling=POOLED))
    tower, pooling = tower_of_run(run), POOLINGS[POOLED]
    text, has_image = sample_lengths(3000 * RANKS, 0, LONGEST - FRAMES[1] // 2 * pooling.width(tower.num_features))
    draw = np.random.default_rng(1)
    is_video = (draw.random(len(text)) < VIDEOS) * has_image
    frames = draw.integers(FRAMES[0], FRAMES[1] + 1, len(text))
    groups = -(-frames // pooling.temporal)
    visual = np.where(is_video, groups * pooling.width(tower.num_features), tower.num_features * has_image)
    work = np.where(is_video, frames, has_image) * tower.work(tower.num_rows)
    return compared(run, text + visual, work, f"videos {seq_length} tokens, {POOLED}")


def run_of(tower: str, data: DataConfig) -> RunConfig:
    """Stage 2 of Phi-2."""
    return RunConfig(model=ModelConfig(backbone="phi-2", tower=tower), training=TrainingConfig(stage=2), data=data)


def compared(run: RunConfig, tokens: np.ndarray, work: np.ndarray, name: str) -> dict:
    """Figures of samples of so many `tokens` that make so much `work` for the tower."""
    backbone, tower = get_backbone(run.model.backbone), tower_of_run(run)
    attention = tokens.astype(float) ** 2
    costs = attention + tower_weight(run, backbone, tower) * work
    products = row_products(run, backbone, tower)
    found = {}
    for order, by in (("sorted by cost", costs), ("sorted by attention", attention)):
        rows = pack_epoch(range(len(tokens)), tokens.tolist(), run.data.seq_length, BUFFER, by.tolist())
        kinds = {"tower": [work[row].sum() for row in rows], "whole row": [products + costs[row].sum() for row in rows]}
        for kind, per_row in kinds.items():
            found[f"{name}/{kind}, {order}, busiest over mean"] = imbalance(per_row)
        if by is costs:
            dealt = {
                f"{name}/{kind}, dealt, {ROUNDS} rows a rank, busiest over mean": steps(per_row, kinds["whole row"])
                for kind, per_row in kinds.items()
            }
    return found | dealt


def row_products(run: RunConfig, backbone, tower) -> float:
    """The matrix products of a packed row, which all rows have alike, in the units of costs/balance.py."""
    alone = Sharding(run=run, backbone=backbone, tower=tower)
    length = run.data.seq_length
    works = [*list(layer_work(alone, False, length, length)) * backbone.num_layers, *last_stage_work(alone, length)]
    flops = sum(useful_flops(work) for work in works if isinstance(work, Product))
    width = backbone.num_attention_heads * backbone.kv_channels * backbone.num_layers
    return flops / (4.0 * width * WITH_GRADIENTS * CAUSAL)


def imbalance(per_row) -> float:
    """Busiest rank over the mean, of steps of one row per rank, which take the rows in turn."""
    table = np.array(per_row[: len(per_row) // RANKS * RANKS], dtype=float).reshape(-1, RANKS)
    table = table[table.mean(1) > 0]
    return round(float((table.max(1) / table.mean(1)).mean()), 3)


def steps(per_row, costs) -> float:
    """The same of steps of ROUNDS rows per rank, which are dealt by their costs."""
    size, found = RANKS * ROUNDS, []
    for start in range(0, len(per_row) // size * size, size):
        dealt = deal(costs[start : start + size], RANKS)
        found.append([sum(per_row[start + number] for number in own) for own in dealt])
    return imbalance(np.concatenate(found))
