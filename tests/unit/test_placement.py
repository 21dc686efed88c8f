"""Which layers become MoE layers."""

import json

import pytest

from megatron_moellava.config import ConfigError
from megatron_moellava.placement import moe_layer_freq, moe_layers
from tests.helpers.conversion_models import GOLDEN


@pytest.mark.parametrize("backbone", ["phi", "llama"])
@pytest.mark.parametrize("placement", ["first_half", "second_half", "sparse", "dense"])
def test_placements_are_the_originals(backbone, placement):
    recorded = json.loads((GOLDEN / backbone / "moe_layers.json").read_text())
    assert list(moe_layers(placement, 4)) == recorded[placement]


def test_placement_outside_of_the_model_is_an_error():
    for placement in ("middle", (1, 4), (), (1, 1)):
        with pytest.raises(ConfigError, match="placement"):
            moe_layers(placement, 4)


def test_megatrons_form_has_one_entry_a_layer():
    assert moe_layer_freq("sparse", 4) == [1, 0, 1, 0]
    assert moe_layer_freq((3, 0), 4) == [1, 0, 0, 1]
    assert moe_layers((3, 0), 4) == (0, 3)
