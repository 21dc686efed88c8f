"""Recorded gates against ours, without a model."""

import pytest
import torch

from megatron_moellava.model.original_gate import top2_gate
from megatron_moellava.verify.folder import Folder
from megatron_moellava.verify.gates import cases_of, compute, noise_of, short, verify_gates
from megatron_moellava.verify.table import Table


def recorded(**changes) -> dict:
    """What a recording of one layer holds, made by our own gate."""
    torch.manual_seed(0)
    logits_NE, noise_NE = torch.randn(10, 4), torch.randn(10, 4)
    gate = top2_gate(logits_NE, 6, noise_NE)
    settings = {"logits": logits_NE, "noise": noise_NE, "k": 2, "capacity_factor": 1.2, "min_capacity": 0}
    found = {
        "e1": gate.choices_NK[:, 0],
        "e2": gate.choices_NK[:, 1],
        "capacity": 6,
        "slot": gate.slots_NE,
        "weights": gate.probs_NE,
        "l_aux": gate.aux_loss,
    }
    return settings | found | changes


def table_of(tmp_path, expected: dict) -> Table:
    torch.save({"train": {"gates": {"model.layers.2.mlp.gate": expected}}}, tmp_path / "moe.pt")
    table = Table()
    verify_gates(Folder(tmp_path), table)
    return table


def test_a_gate_that_agrees_passes_in_every_quantity(tmp_path):
    table = table_of(tmp_path, recorded())
    assert table.passes and len(table.rows) == 7
    assert {row.case for row in table.rows} == {"gate train layer 2"}


@pytest.mark.parametrize(
    ("name", "quantity"), [("e1", "first expert"), ("slot", "slots"), ("weights", "weights"), ("l_aux", "balance loss")]
)
def test_one_wrong_number_is_seen_in_its_quantity(tmp_path, name, quantity):
    wrong = recorded()
    wrong[name] = wrong[name] + 1
    failed = [row.quantity for row in table_of(tmp_path, wrong).rows if not row.passes]
    assert quantity in failed


def test_recordings_are_read_in_both_forms():
    assert cases_of({"logits": 1}, "moe_residual.pt") == {"residual": {"logits": 1}}
    assert cases_of({"train": {"gates": {}}}, "moe.pt") == {"train": {"gates": {}}}
    assert short("model.layers.12.mlp.deepspeed_moe.gate") == "layer 12"
    assert noise_of({"rts_uniform": "u"}) == "u" and noise_of({"noise": "n", "rts_uniform": "u"}) == "n"


def test_the_capacity_follows_from_the_recorded_settings():
    assert compute(recorded(capacity_factor=0.4)).gate.capacity == 2
    assert compute(recorded(capacity_factor=0.4, min_capacity=5)).gate.capacity == 5
