"""The efficiencies that turn a data sheet into a prediction."""

import dataclasses

from megatron_moellava.planning import hardware


def test_an_efficiency_is_a_share_of_a_peak():
    values = dataclasses.asdict(hardware.CALIBRATION)
    launch = values.pop("launch_seconds")
    assert all(0 < value < 1 for value in values.values()), values
    assert 1e-7 < launch < 1e-4, "host time of a kernel launch is a few microseconds"
    assert values["grouped_matmul"] < values["matmul"], "experts' products are smaller than dense ones"
