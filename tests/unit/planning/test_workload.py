"""What a micro-batch of a stage holds on average."""

from dataclasses import replace

import pytest

from megatron_moellava.planning.workload import PACKED_FILL, STAGE_DATA, full_load, mean_load
from megatron_moellava.towers import get_tower
from tests.helpers.planning import layout_of


def test_the_published_stages_have_their_published_sizes():
    assert [STAGE_DATA[stage].samples for stage in (1, 2, 3)] == [558_128, 964_000, 665_298]
    assert [STAGE_DATA[stage].global_batch_size for stage in (1, 2, 3)] == [256, 128, 128]
    layout = layout_of(1)
    assert STAGE_DATA[1].text_tokens == 25 and STAGE_DATA[1].shown(layout.tower, layout.run.data).tokens == 576
    assert 0.9 < STAGE_DATA[3].images < 1.0, "40,688 of the 665,298 rows are text"


def test_a_packed_row_holds_several_samples_and_is_nearly_full():
    layout = layout_of(1)
    load = mean_load(layout, STAGE_DATA[3])
    assert load.tokens == layout.tokens
    assert load.samples * load.length == pytest.approx(PACKED_FILL * layout.tokens)
    assert load.images == pytest.approx(load.samples * STAGE_DATA[3].images)


def test_padded_rows_are_samples_and_no_longer_than_a_row():
    layout = layout_of(1, data__packing=False, training__micro_batch_size=4)
    load = mean_load(layout, STAGE_DATA[3])
    assert load.samples == 4 and load.tokens == 4 * load.length <= layout.tokens


def test_pooled_videos_are_few_tokens_and_much_work_for_the_tower():
    data = replace(STAGE_DATA[2], images=0.5, videos=0.5, video_seconds=30.0)
    settings = {"video_pooling": "2x2x2", "video_fps": 1.0, "video_frames": 16}
    layout = layout_of(1, **{f"data__{name}": value for name, value in settings.items()})
    load = mean_load(layout, data)
    assert load.length == data.text_tokens + 0.5 * 576 + 0.5 * 8 * 144
    assert load.images == pytest.approx(load.samples * (0.5 + 0.5 * 16))
    plain = mean_load(layout_of(1), replace(data, videos=0.0))
    assert load.images / load.tokens > 7 * plain.images / plain.tokens


def test_what_a_row_cuts_off_is_not_encoded():
    data = replace(STAGE_DATA[2], images=0.0, videos=1.0, text_tokens=48)
    load = mean_load(layout_of(1), data)  # eight frames of 576 tokens, of which a row of 2,048 holds 3.5
    assert load.length == 2048 and load.images / load.samples == pytest.approx(8 * 2048 / (48 + 8 * 576))


def test_small_pictures_at_native_resolution_reach_less_far():
    layout = layout_of(1, data__enlarge_images=False, data__max_image_tokens=1024)
    tower = replace(get_tower("siglip2-so400m-patch16-naflex"), max_num_patches=1024)
    layout = replace(layout, tower=tower)
    load = mean_load(layout, replace(STAGE_DATA[1], image_size=(320, 240)))
    assert load.reach == 20 * 15 and load.images == pytest.approx(load.samples * 300 / 1024)


def test_a_full_row_is_text():
    load = full_load(layout_of(1, training__micro_batch_size=2))
    assert (load.images, load.samples, load.tokens) == (0.0, 2, 2 * load.length)
