"""GPUs as data."""

import pytest

from megatron_moellava.config import ConfigError
from megatron_moellava.planning.hardware import get_gpu


def test_unknown_gpu_names_the_nearest():
    with pytest.raises(ConfigError, match="h100"):
        get_gpu("h10")
