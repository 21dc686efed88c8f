"""From `auto` to one name that all processes have, and what is said of it; tests/distributed has machines that differ."""

import pytest

from megatron_moellava.machine import SLOWER_WITHOUT_UNITS
from megatron_moellava.model.precision import settle_and_say, settled
from tests.helpers.runs import tiny

pytestmark = pytest.mark.usefixtures("avx2")


def test_auto_is_said_with_its_reason_in_one_line(world, capsys):
    run = settle_and_say(tiny(training__precision="auto"))
    assert run == tiny(training__precision="fp32")
    assert capsys.readouterr().out == f"precision fp32: {settled(tiny(training__precision='auto')).reason}\n"


def test_bf16_without_units_is_one_warning_and_fp32_none(world, capsys):
    assert settle_and_say(tiny(training__precision="bf16")) == tiny(training__precision="bf16")
    said = capsys.readouterr().out
    assert said.startswith("warning: precision bf16, but ") and SLOWER_WITHOUT_UNITS in said and said.count("\n") == 1
    settle_and_say(tiny(training__precision="fp32"))
    assert capsys.readouterr().out == ""
