"""What a micro-batch of a stage holds on average."""

import pytest

from megatron_moellava.planning.workload import PACKED_FILL, STAGE_DATA, full_load, mean_load
from tests.helpers.planning import layout_of


def test_the_published_stages_have_their_published_sizes():
    assert [STAGE_DATA[stage].samples for stage in (1, 2, 3)] == [558_128, 964_000, 665_298]
    assert [STAGE_DATA[stage].global_batch_size for stage in (1, 2, 3)] == [256, 128, 128]
    assert STAGE_DATA[1].tokens_per_sample(576) == 25 + 576
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


def test_a_full_row_is_text():
    load = full_load(layout_of(1, training__micro_batch_size=2))
    assert (load.images, load.samples, load.tokens) == (0.0, 2, 2 * load.length)
