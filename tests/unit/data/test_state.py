"""A loader's state for another number of ranks."""

import pytest

from megatron_moellava.config import DataError
from megatron_moellava.data.state import redistribute


def state(position: int, seen: int, epoch: int = 0, **counters) -> dict:
    counted = {"seen": seen, "trained": seen, "skipped": {}, "notes": {}, "bad_epoch": epoch, "bad": []} | counters
    fingerprint = {"seed": 1, "rank": 0, "world_size": 2}
    return {"fingerprint": fingerprint, "engine": {"epoch": epoch, "position": position}, "counters": counted}


def test_every_rank_continues_from_the_same_position_and_what_was_counted_is_counted_once():
    saved = [state(6, 10, skipped={"missing image": 1}), state(6, 12, skipped={"missing image": 2}, notes={"x": 1})]
    moved = redistribute(saved, 3)
    assert [item["engine"] for item in moved] == [{"epoch": 0, "position": 6}] * 3
    assert [item["fingerprint"] for item in moved] == [{"seed": 1, "rank": rank, "world_size": 3} for rank in range(3)]
    assert (moved[0]["counters"]["seen"], moved[0]["counters"]["skipped"]) == (22, {"missing image": 3})
    assert moved[0]["counters"]["notes"] == {"x": 1}
    assert moved[1]["counters"]["seen"] == 0 and moved[1]["counters"]["skipped"] == {}


def test_a_rank_that_is_ahead_goes_back_to_where_all_have_been():
    assert redistribute([state(8, 1), state(6, 1)], 1)[0]["engine"]["position"] == 6
    assert redistribute([state(2, 1, epoch=1), state(9, 1)], 1)[0]["engine"] == {"epoch": 0, "position": 9}


def test_a_rank_in_the_midst_of_a_dealt_step_goes_back_to_its_start():
    ahead = state(8, 1) | {"engine": {"epoch": 0, "position": 8, "rounds": 1}}
    assert redistribute([state(8, 1), ahead], 1)[0]["engine"] == {"epoch": 0, "position": 8}
    assert redistribute([ahead, ahead], 1)[0]["engine"] == {"epoch": 0, "position": 8}


def test_bad_samples_of_the_newest_epoch_are_remembered_once():
    saved = [state(1, 1, epoch=2, bad=[5, 3]), state(1, 1, epoch=2, bad=[3]), state(1, 1, epoch=1, bad=[9])]
    assert redistribute(saved, 1)[0]["counters"]["bad"] == [3, 5]


def test_a_damaged_state_is_an_error():
    with pytest.raises(DataError, match=r"cannot be restored \(KeyError\('engine'\)\); the checkpoint is damaged"):
        redistribute([{"counters": {}}], 1)
