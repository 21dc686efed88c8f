"""The table of a verification says what is wrong, also when a difference has no size, and what it leaves out."""

import math

import pytest

from megatron_moellava.verify.table import Table


@pytest.mark.parametrize("ours", [[math.nan], [math.inf], [1.0, 2.0]])
def test_an_infinite_difference_names_its_case(ours):
    table = Table()
    table.close("dense eval/single", "logits", ours, [1.0], 1e-4)
    table.named("dense train", "gradients", {}, 1e-4)
    text = table.render()
    assert "dense eval/single" in text and text.count("inf") == 2 and "FAIL  nothing to compare" in text
    assert "2 quantities compared, 2 failed" in text and not table.passes
