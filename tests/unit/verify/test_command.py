"""Which layouts can be verified."""

import pytest

from megatron_moellava.config import ConfigError
from megatron_moellava.verify.command import base_run


@pytest.mark.parametrize(
    "overrides",
    [
        ["parallel.context_parallel_size=2"],
        ["parallel.pipeline_model_parallel_size=2", "parallel.virtual_pipeline_model_parallel_size=2"],
        ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=false"],
    ],
)
def test_a_layout_that_cannot_be_verified_is_refused(overrides):
    with pytest.raises(ConfigError, match="cannot be verified"):
        base_run(overrides)
    assert base_run(["parallel.tensor_model_parallel_size=2"])
