"""A loader's state as JSON, and for another number of ranks."""

import json

import numpy as np
import pytest
import torch

from megatron_moellava.config import DataError
from megatron_moellava.data.state import from_json, redistribute, to_json

from megatron.energon.state import FlexState


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        7,
        0.5,
        "text",
        b"\x00\xff",
        [1, "a", None],
        (1, (2, 3)),
        {"a": 1, 2: (3,)},
        list(range(100)),
        tuple(range(-50, 50)),
        [2**70, *range(40)],
        [True] * 40,
    ],
)
def test_plain_values_come_back_with_their_types(value):
    back = from_json(json.loads(json.dumps(to_json(value))))
    assert back == value and type(back) is type(value)
    if isinstance(value, list | tuple):
        assert [type(item) for item in back] == [type(item) for item in value]


def test_arrays_tensors_and_energons_own_dictionaries_come_back():
    array = np.arange(6, dtype=np.uint32).reshape(2, 3)
    back = from_json(json.loads(json.dumps(to_json({"array": array, "tensor": torch.arange(3)}))))
    assert np.array_equal(back["array"], array) and back["array"].dtype == array.dtype
    assert torch.equal(back["tensor"], torch.arange(3))
    flex = from_json(to_json(FlexState(a=1)))
    assert isinstance(flex, FlexState) and flex["a"] == 1
    assert from_json(to_json(np.int64(5))) == 5


def test_what_is_not_known_is_an_error_in_both_directions():
    with pytest.raises(DataError, match="holds a set"):
        to_json({1, 2})
    with pytest.raises(DataError, match=r"unknown class 'os\.system'"):
        from_json({"class": "os.system", "fields": {}})


def workers(ranks: int, per_rank: int, next_worker: int = 0) -> list[dict]:
    """Saved states of `ranks` ranks whose workers are numbered on."""
    return [
        {
            "fingerprint": {"rank": rank, "num_workers": per_rank},
            "counters": {"seen": 10, "skipped": {"missing image": 1}, "notes": {}},
            "engine": {
                "class": "SavableDataLoaderState",
                "fields": {
                    "next_worker_id": next_worker,
                    "worker_states": {"list": [rank * per_rank + worker for worker in range(per_rank)]},
                },
            },
        }
        for rank in range(ranks)
    ]


def test_workers_move_between_ranks_in_their_order():
    moved = redistribute(workers(2, 2), world_size=4, num_workers=1)
    assert [state["engine"]["fields"]["worker_states"]["list"] for state in moved] == [[0], [1], [2], [3]]
    assert [state["fingerprint"]["rank"] for state in moved] == [0, 1, 2, 3]
    assert moved[0]["counters"] == {"seen": 20, "skipped": {"missing image": 2}, "notes": {}}
    assert moved[1]["counters"]["seen"] == 0, "what was counted is counted once"
    (single,) = redistribute(workers(2, 2), world_size=1, num_workers=4)
    assert single["engine"]["fields"]["worker_states"]["list"] == [0, 1, 2, 3]


def test_what_cannot_be_dealt_out_exactly_is_refused():
    with pytest.raises(DataError, match=r"any ranks x data\.num_workers that gives 4, not 3 x 1"):
        redistribute(workers(2, 2), 3, 1)
    with pytest.raises(DataError, match="between two workers' turns"):
        redistribute(workers(2, 2, next_worker=1), 4, 1)


def test_a_position_moves_if_the_ranks_can_have_shared_it():
    counters = {"seen": 1, "skipped": {}, "notes": {}}
    saved = [{"fingerprint": {}, "counters": counters, "engine": {"position": 6}} for _ in range(2)]
    assert [state["engine"]["position"] for state in redistribute(saved, 3)] == [4, 4, 4]
    with pytest.raises(DataError, match="after 12 micro-batches of the epoch, which 5 ranks"):
        redistribute(saved, 5)
