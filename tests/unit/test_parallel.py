"""Process groups of a single process; tests/distributed has the layouts of several."""

import pytest
import torch
import torch.distributed as dist

from megatron_moellava import parallel
from megatron_moellava.config import ParallelConfig

from megatron.core import parallel_state


def test_one_process_is_every_rank_there_is(world):
    assert world.is_main_process() and world.reads_data()
    assert world.is_first_stage() and world.is_last_stage() and world.num_stages() == 1
    assert (world.data_parallel_rank(), world.data_parallel_size()) == (0, 1)
    assert (world.context_parallel_rank(), world.context_parallel_size()) == (0, 1)


def test_only_the_main_process_speaks(world, capsys, monkeypatch):
    world.say("heard")
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    world.say("not heard")
    assert capsys.readouterr().out == "heard\n"


def test_sums_and_gathers_of_one_rank_are_its_own_numbers(world):
    value = torch.tensor(2.5)
    total = world.sum_over_data_parallel(value)
    assert float(total) == 2.5 and total.dtype == torch.float64 and total is not value
    assert world.gather_over_data_parallel([3, 4]) == [[3, 4]]


def test_a_broadcast_within_one_process_moves_nothing(world):
    tensors = {"tokens": torch.arange(3), "pixels": None}
    received, meta = world.broadcast_from_reader(tensors, {"ids": ["a"]})
    assert received["tokens"].tolist() == [0, 1, 2] and received["pixels"] is None
    assert meta == {"ids": ["a"]}
    assert world.broadcast_on_first_stage({"pixels": torch.ones(2)})["pixels"].tolist() == [1.0, 1.0]


def test_the_same_seed_gives_the_same_numbers_again():
    drawn = []
    for seed in (7, 7, 8):
        parallel.initialize(ParallelConfig(), seed)
        drawn.append(torch.rand(4).tolist())
    parallel.shutdown()
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_process_may_build_its_groups_again():
    for _ in range(2):
        parallel.initialize(ParallelConfig(), 1)
        assert parallel_state.model_parallel_is_initialized()
        parallel.shutdown()
        assert not parallel_state.model_parallel_is_initialized() and not dist.is_initialized()
    parallel.shutdown()  # without groups there is nothing to undo


def test_a_layout_that_does_not_divide_the_world_is_an_error():
    with pytest.raises(RuntimeError, match="world_size"):
        parallel.initialize(ParallelConfig(tensor_model_parallel_size=2), 1)
    parallel.shutdown()
