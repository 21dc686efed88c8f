"""Which layers and how many micro-batches a pipeline rank holds."""

import pytest

from megatron_moellava.costs.layout import schedule_states
from tests.helpers.planning import layout_of


def test_axes_divide_the_world():
    layout = layout_of(
        16,
        parallel__tensor_model_parallel_size=2,
        parallel__pipeline_model_parallel_size=2,
        parallel__expert_model_parallel_size=4,
    )
    assert (layout.tp, layout.pp, layout.ep, layout.etp) == (2, 2, 4, 1)
    assert (layout.dp, layout.expert_dp) == (4, 2)
    assert layout.micro_batches == layout.run.training.global_batch_size // (4 * layout.run.training.micro_batch_size)


def test_layers_are_dealt_out_in_model_order():
    layout = layout_of(4, parallel__pipeline_model_parallel_size=4)
    held = [layer for rank in range(4) for chunk in layout.layers_of(rank) for layer in chunk]
    assert held == list(range(layout.backbone.num_layers))
    assert sum(sum(layout.kinds_of(rank)) for rank in range(4)) == sum(layout.moe_layers) == 16
    assert [is_moe for chunk in layout.chunk_kinds(0) for is_moe in chunk] == layout.kinds_of(0)


def test_a_first_stage_may_hold_fewer_layers():
    layout = layout_of(2, parallel__pipeline_model_parallel_size=2, parallel__num_layers_in_first_pipeline_stage=10)
    assert layout.stage_sizes == (10, 22)


def test_earlier_stages_run_ahead():
    assert [max(schedule_states(4, rank, 1, 16)) for rank in range(4)] == [(4,), (3,), (2,), (1,)]
    assert max(schedule_states(4, 0, 1, 2)) == (2,), "no more than there are"


@pytest.mark.parametrize("rank", range(4))
def test_every_micro_batch_that_is_kept_is_let_go(rank):
    """However the schedule interleaves, a state never holds less than nothing nor more than there are."""
    for state in schedule_states(4, rank, 2, 16):
        assert all(0 <= count <= 16 for count in state)
