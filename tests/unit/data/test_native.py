"""Pictures at native resolution: sizes, budgets, patches. tests/parity compares with transformers' processor."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_moellava.config import DataConfig, DataError
from megatron_moellava.data.encode import IMAGE_TOKEN
from megatron_moellava.data.loader import build_train_loader
from megatron_moellava.data.native import grid, patches, plans, shared_budget, whole
from megatron_moellava.data.sample import BadSample
from megatron_moellava.data.tokenizer import load_tokenizer
from megatron_moellava.towers import get_tower
from tests.helpers.data_files import ASSETS, config, conversation, row, take, write_rows

TINY = get_tower("naflex-tiny")  # patches of 16 pixels, 16 of them


@pytest.mark.parametrize("width", [1, 7, 100, 640, 5000])
@pytest.mark.parametrize("height", [1, 33, 480, 5000])
@pytest.mark.parametrize("budget", [1, 2, 16, 200, 256])
def test_a_grid_fills_its_budget_and_keeps_the_shape(width, height, budget):
    rows, columns = grid(width, height, 16, budget)
    assert 1 <= rows * columns <= budget
    if budget == 256 and min(width, height) > 10 and 0.2 < width / height < 5:
        assert rows * columns > 0.8 * budget
        assert abs(np.log(columns / rows * height / width)) < np.log(1.35), "sides are rounded up to whole units"


def test_a_sample_shares_its_budget_and_the_larger_pictures_give_way():
    assert shared_budget([100, 20, 90], 300) == [100, 20, 90]
    assert shared_budget([100, 20, 90], 140) == [60, 20, 60]
    assert shared_budget([16] * 4, 40) == [10] * 4
    assert shared_budget([5, 5], 2) == [1, 1]
    for limit in range(3, 220):
        found = shared_budget([100, 20, 90], limit)
        assert sum(found) <= limit and min(found) >= 1


def test_budgets_hold_for_the_pictures_of_a_sample():
    sizes = [(640, 480), (480, 640), (64, 16)]
    one, *_ = plans(sizes[:1], TINY, DataConfig(), "row 0")
    assert one.tokens == one.grid[0] * one.grid[1] == 12 and one.grid == (3, 4)
    made = plans(sizes, TINY, DataConfig(max_sample_image_tokens=20), "row 0")
    assert sum(plan.tokens for plan in made) <= 20
    shuffled = plans(sizes, get_tower("naflex-tiny@pixel_shuffle"), DataConfig(), "row 0")
    assert all(plan.tokens <= 4 and plan.tokens * 4 == plan.grid[0] * plan.grid[1] for plan in shuffled)
    assert all(side % 2 == 0 for plan in shuffled for side in plan.grid)
    with pytest.raises(BadSample, match=r"3 images, and data\.max_sample_image_tokens=2"):
        plans(sizes, TINY, DataConfig(max_sample_image_tokens=2), "row 0")


def test_small_pictures_are_enlarged_only_if_they_shall_be():
    large = replace(TINY, max_num_patches=256)
    (enlarged,) = plans([(64, 48)], large, DataConfig(), "row 0")
    (kept,) = plans([(64, 48)], large, DataConfig(enlarge_images=False), "row 0")
    assert enlarged.tokens > 200 and kept.grid == (3, 4)


def test_patches_are_the_picture_line_by_line_and_frames_are_square():
    pixels = np.arange(48 * 64 * 3, dtype=np.uint8).reshape(48, 64, 3)
    image = Image.fromarray(pixels)
    (plan,) = plans([image.size], TINY, DataConfig(enlarge_images=False), "row 0")
    found = patches(image, TINY, plan)
    assert found.shape == (12, 3, 16, 16)
    restored = (whole(found, plan.grid) * 0.5 + 0.5) * 255
    assert (restored.round().astype(np.uint8) == pixels.transpose(2, 0, 1)).all(), "no pixel was interpolated"
    (frame,) = plans([None], TINY, DataConfig(), "row 0")
    assert frame.grid == (4, 4) and patches(image, TINY, frame, is_frame=True).shape[0] == 16


def loader_of(folder, tower=TINY, share=None, **changes):
    """Rows over pictures of five shapes, some rows with two of them. `share`: of the rank."""
    for number, size in enumerate(SHAPES):
        pixels = np.random.default_rng(number).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    names = [f"{number}.png" for number in range(len(SHAPES))]
    rows = [row(number, names[number % len(SHAPES)]) for number in range(24)]
    for number in range(0, 24, 4):
        pair = [names[number % 5], names[(number + 2) % 5]]
        rows[number] = row(number, pair, conversations=conversation("<image>\nand\n<image>\nare?", f"answer {number}"))
    data = config(write_rows(folder, rows), seq_length=256, **changes)
    tokenizer = load_tokenizer(ASSETS / "tok_bpe")
    share = {"seed": 1, "rank": 0, "world_size": 1, "micro_batch_size": 2, "pad_multiple": 4} | (share or {})
    return build_train_loader(data, tokenizer, tower, **share)


SHAPES = ((96, 32), (32, 96), (64, 64), (48, 33), (16, 16))


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("name", ["naflex-tiny", "naflex-tiny@pixel_shuffle"])
def test_batches_have_room_for_pictures_of_different_sizes(tmp_path, name, packing):
    tower = get_tower(name)
    seen = set()
    for batch in take(loader_of(tmp_path, tower, packing=packing, enlarge_images=False), 6):
        counts = [rows * columns for rows, columns in batch.grids]
        assert batch.pixel_values_NCHW.shape == (sum(counts), 3, 16, 16)
        assert int((batch.tokens_BS == IMAGE_TOKEN).sum()) == batch.counts.image_rows == sum(counts) / tower.shuffle**2
        seen |= set(batch.grids)
    assert len(seen) > 2


def test_a_loader_of_such_pictures_continues_where_it_was(tmp_path):
    first = loader_of(tmp_path)
    take(first, 3)
    state = json.loads(json.dumps(first.state_dict()))
    expected = take(first, 4)
    again = loader_of(tmp_path)
    again.load_state_dict(state)
    for left, right in zip(expected, take(again, 4), strict=True):
        assert left.sample_ids == right.sample_ids and left.grids == right.grids
        assert torch.equal(left.tokens_BS, right.tokens_BS)
        assert torch.equal(left.pixel_values_NCHW, right.pixel_values_NCHW)
    for changes in ({"enlarge_images": False}, {"max_sample_image_tokens": 20}):
        with pytest.raises(DataError, match=r"native: .* then"):
            loader_of(tmp_path, **changes).load_state_dict(state)
    with pytest.raises(DataError, match="num_features: 16 then, 9 now"):
        loader_of(tmp_path, replace(TINY, max_num_patches=9)).load_state_dict(state)


def test_a_row_with_more_pictures_than_its_budget_has_tokens_is_bad(tmp_path):
    loader = loader_of(tmp_path, max_sample_image_tokens=1, max_skip_share=0.5)
    take(loader, 12)
    assert loader.skipped["too many images"] > 0


# Rows of a picture each: with nothing to choose from, packing leaves all differences to dealing.
STEP = {"enlarge_images": False, "packing_buffer": 1}


PADDED = {"enlarge_images": False, "packing": False}


def ranks_of(folder, world_size: int, settings: dict) -> list:
    share = {
        "world_size": world_size,
        "micro_batch_size": 1,
        "accumulation_steps": 8 // world_size,
        "tower_weight": 100.0,
    }
    return [loader_of(folder, share=share | {"rank": rank}, **settings) for rank in range(world_size)]


def steps_of(loaders: list, count: int) -> list[list[list]]:
    """step -> rank -> batches"""
    return [[take(loader, 8 // len(loaders)) for loader in loaders] for _ in range(count)]


def samples(step: list[list]) -> list[str]:
    return sorted(name for batches in step for batch in batches for name in batch.sample_ids)


def busiest(shares: list[list]) -> float:
    """The most work of the tower that a rank has, over the mean."""
    work = [sum(TINY.work(rows * columns) for batch in batches for rows, columns in batch.grids) for batches in shares]
    return max(work) / np.mean(work)


@pytest.mark.parametrize("settings", [STEP, PADDED], ids=["packed", "padded"])
def test_rows_are_dealt_by_what_their_pictures_cost_and_a_step_stays_what_it_was(tmp_path, settings):
    one, two = (steps_of(ranks_of(tmp_path, world_size, settings), 4) for world_size in (1, 2))
    assert [samples(step) for step in two] == [samples(step) for step in one]
    in_turn = [busiest([step[0][rank::2] for rank in range(2)]) for step in one]
    assert np.mean([busiest(step) for step in two]) < 1.10 < np.mean(in_turn)


@pytest.mark.parametrize("settings", [STEP, PADDED], ids=["packed", "padded"])
@pytest.mark.parametrize("then, now", [(2, 4), (4, 1), (1, 2)])
def test_another_number_of_ranks_continues_with_the_same_steps(tmp_path, then, now, settings):
    running = ranks_of(tmp_path, then, settings)
    steps_of(running, 2)
    saved = {rank: json.loads(json.dumps(loader.state_dict())) for rank, loader in enumerate(running)}
    expected = [samples(step) for step in steps_of(running, 3)]
    resumed = ranks_of(tmp_path, now, settings)
    for loader in resumed:
        loader.load_states(saved)
    assert [samples(step) for step in steps_of(resumed, 3)] == expected
