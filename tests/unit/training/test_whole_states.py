"""States of whole parameters take the name and the place of their weight; test_muon.py saves and loads them."""

import torch

from megatron_moellava.training.whole_states import _owned, of_weight

from megatron.core.dist_checkpointing import ShardedTensor


def test_a_state_lies_where_its_weight_does_under_a_name_of_its_own():
    weight = ShardedTensor.from_rank_offsets(
        "layer.weight", torch.ones(2, 3).bfloat16(), (0, 1, 4), replica_id=(0, 1, 2)
    )
    state = of_weight(weight, "momentum_buffer", torch.zeros(2, 3))
    assert (state.key, state.dtype) == ("optimizer.state.momentum_buffer.layer.weight", torch.float32)
    assert (state.global_shape, state.global_offset) == ((8, 3), (2, 0))
    assert _owned(state).replica_id == (0, 1, 0) and state.replica_id == (0, 1, 2)
