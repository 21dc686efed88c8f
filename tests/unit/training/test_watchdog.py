"""What is said of ranks that hang or do not answer."""

from megatron_moellava.training.watchdog import report


def post(waits: bool, note: str = "step 5, reading data", place: str = "read (media.py:40)") -> dict:
    return {"note": note, "place": place, "waits": waits}


def test_rank_that_is_not_in_a_collective_is_the_one():
    text = report([post(True), post(False), post(True)], 600)
    assert "rank 1 holds up the others at step 5, reading data: read (media.py:40)" in text
    assert "ranks 0, 2 wait for others" in text


def test_rank_without_an_answer_is_named():
    text = report([post(True), None], 600)
    assert "rank 1 does not answer" in text and "rank 0 waits for others" in text
    assert "holds up" not in text


def test_many_waiting_ranks_take_one_line():
    text = report([post(False), *[post(True)] * 20], 600)
    assert "ranks 1, 2, 3, 4, 5, 6, 7, 8 and 12 more wait" in text
    assert len(text.splitlines()) == 3
