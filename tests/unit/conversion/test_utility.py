"""Which experts get a copy: those with the largest gradients, or the most used where no gradients are known."""

import json
from dataclasses import replace

import pytest
import torch

from megatron_moellava.config import CheckpointError, ConfigError, MoEConfig
from megatron_moellava.conversion.megatron_checkpoint import open_checkpoint
from megatron_moellava.conversion.routing_log import PLACED_AT
from megatron_moellava.conversion.upcycle import upcycle_checkpoint
from megatron_moellava.conversion.utility import GRADIENTS, TOKENS, greedy, sources_by_utility
from tests.helpers.conversion_models import read
from tests.helpers.trainers import one_layout, started

EXPERTS = "language_model.decoder.layers.{}.mlp.experts.experts.linear_fc1.weight"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(folder of a run of one step, sum of the squared gradients of each expert by layer)."""
    folder = tmp_path_factory.mktemp("run")
    with one_layout():
        trainer = started(("experts", "router"), **{"checkpoint.save": str(folder), "logging.routing_interval": 1})
        trainer.step()
        trainer.save()
        squares = {layer: torch.zeros(4, dtype=torch.float64) for layer in (0, 2)}
        for name, parameter in trainer.chunks[0].named_parameters():
            if ".mlp.experts." in name:
                layer, expert = int(name.split(".layers.")[1].split(".")[0]), int(name[-1])
                squares[layer][expert] += parameter.main_grad.double().square().sum()
        trainer.log.close()
    return folder, squares


@pytest.mark.parametrize(
    ("utilities", "experts", "expected"),
    [
        ([8.0, 3.0, 1.0], 6, [0, 1, 2, 0, 0, 1]),
        ([1.0, 1.0], 4, [0, 1, 0, 1]),
        ([0.0, 0.0], 3, [0, 1, 0]),
        ([1.0, 9.0], 2, [0, 1]),
    ],
)
def test_each_copy_goes_to_the_largest_utility_per_copy(utilities, experts, expected):
    assert greedy(utilities, experts) == expected


def test_utility_is_the_sum_of_the_squared_gradients(trained, tmp_path):
    folder, squares = trained
    kind, sources = sources_by_utility(open_checkpoint(folder), 6)
    assert kind == GRADIENTS
    assert sources == {layer: greedy(values.tolist(), 6) for layer, values in squares.items()}
    upcycle_checkpoint(folder, save=tmp_path / "more", moe=MoEConfig(num_moe_experts=6), select="utility")
    more = open_checkpoint(tmp_path / "more")
    assert more.run.provenance["sources"] == {str(layer): numbers for layer, numbers in sources.items()}
    before = open_checkpoint(folder).tensors
    for layer, numbers in sources.items():
        new, old = read(more.tensors[EXPERTS.format(layer)]), read(before[EXPERTS.format(layer)])
        assert all(torch.equal(new[number], old[source]) for number, source in enumerate(numbers))


def test_without_gradients_the_recorded_load_counts(trained, tmp_path):
    folder, _ = trained
    bare = tmp_path / "bare"
    upcycle_checkpoint(folder, save=bare, moe=MoEConfig(num_moe_experts=5))  # a conversion has no optimizer states
    with pytest.raises(CheckpointError, match=r"no optimizer states of its experts, and .* no routing.jsonl"):
        sources_by_utility(open_checkpoint(bare), 6)
    rows = [{"layer": layer, "choices": [1, 2, 9, 4, 3]} for layer in (0, 2)]
    other = [{"layer": 0, "choices": [7, 1]}]
    lines = [{"iteration": 0, "layers": rows}, {"iteration": 0, "layers": other}, {"iteration": 9, "layers": rows}]
    (bare / "routing.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"iterat')
    source = open_checkpoint(bare)
    assert sources_by_utility(source, 7) == (TOKENS, {layer: [0, 1, 2, 3, 4, 2, 2] for layer in (0, 2)})
    elsewhere = replace(source, run=replace(source.run, provenance={PLACED_AT: 0}))  # experts had other numbers then
    with pytest.raises(CheckpointError, match=r"no routing.jsonl"):
        sources_by_utility(elsewhere, 7)


def test_there_must_be_something_to_choose(trained, dense, tmp_path):
    folder, _ = trained
    moe = open_checkpoint(folder).model.required_moe
    with pytest.raises(ConfigError, match="and this one is dense"):
        upcycle_checkpoint(dense[0], save=tmp_path / "x", moe=MoEConfig(), select="utility")
    with pytest.raises(ConfigError, match="select='best' is unknown"):
        upcycle_checkpoint(folder, save=tmp_path / "x", moe=MoEConfig(num_moe_experts=6), select="best")
    with pytest.raises(ConfigError, match="every expert is copied equally often, which keeps the function"):
        grown = replace(moe, num_moe_experts=8, moe_router_topk=4)
        upcycle_checkpoint(folder, save=tmp_path / "x", moe=grown, select="utility")
