"""Processes on machines of different kinds compute in one precision."""

import pytest

from megatron_moellava.model.precision import UNLIKE

jobs = [
    {"id": f"precision {held}", "run": "run_precision", "world": 2, "held back": list(held)}
    for held in ((), (0, 1), (0,), (1,))
]


@pytest.mark.parametrize("job", jobs, ids=[job["id"] for job in jobs])
def test_every_process_takes_the_same_precision_and_says_why(job, result):
    own, taken, reasons = zip(*result["ranks"], strict=True)
    assert all(own[rank] == "fp32" for rank in job["held back"])
    assert set(taken) == {own[0] if own[0] == own[1] else "fp32"}
    assert [reason == UNLIKE for reason in reasons] == [
        one != precision for one, precision in zip(own, taken, strict=True)
    ]
