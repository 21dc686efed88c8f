"""Without fp32 main parameters: what Adam steps is what the model computes with."""

import pytest
import torch

from megatron_moellava.training.main_params import rounded_stochastically
from megatron_moellava.training.optimizer import distributed_optimizers
from tests.helpers.trainers import one_layout, started

ROLES = ("language.attention", "experts", "router")


@pytest.fixture(scope="module", autouse=True)
def one_process():
    with one_layout():
        yield


def test_a_value_between_two_of_bf16_becomes_either_and_its_mean_stays():
    values = torch.full((20_000,), 1.0 + 0.25 * 2**-7)
    rounded = rounded_stochastically(values, 0, key=7)
    assert rounded.unique().tolist() == [1.0, 1.0 + 2**-7]
    assert float(rounded.mean() - 1.0) == pytest.approx(0.25 * 2**-7, rel=0.05)
    assert torch.equal(rounded_stochastically(-values, 0, key=7), -rounded)
    exact = torch.randn(500).bfloat16().float()
    assert torch.equal(rounded_stochastically(exact, 3, key=1), exact)


def test_bits_follow_the_place_and_the_step():
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    whole = rounded_stochastically(values, 0, key=5)
    halves = [rounded_stochastically(values[:400], 0, key=5), rounded_stochastically(values[400:], 400, key=5)]
    assert torch.equal(torch.cat(halves), whole)
    assert not torch.equal(rounded_stochastically(values, 0, key=6), whole)


@pytest.mark.parametrize("stochastic", [False, True])
def test_main_parameters_are_what_the_model_has_after_every_update(stochastic):
    options = {"training.precision": "bf16", "optimizer.lr": 1e-2, "optimizer.main_params_dtype": "bf16"}
    trainer = started(ROLES, **options, **{"optimizer.stochastic_rounding": stochastic})
    for _ in range(2):
        assert trainer.step()[1]
        compared = 0
        for part in distributed_optimizers(trainer.optimizer):
            for models, mains in zip(part.model_float16_groups, part.shard_fp32_from_float16_groups, strict=True):
                for model, main in zip(models, mains, strict=True):
                    assert torch.equal(main, model.detach().float().flatten())
                    compared += main.numel()
            for group in part.shard_fp32_groups:  # routers
                assert any(not torch.equal(item, item.bfloat16().float()) for item in group) or not group
        assert compared > 10_000


def test_small_updates_are_lost_unless_they_are_rounded_by_chance():
    """An update of 1e-6 beside weights of about 0.02 is below half a step of bf16."""
    moved = {}
    for rounding, extra in {
        "nearest": {"optimizer.main_params_dtype": "bf16"},
        "stochastic": {"optimizer.main_params_dtype": "bf16", "optimizer.stochastic_rounding": True},
    }.items():
        trainer = started(("language.attention",), **{"training.precision": "bf16", "optimizer.lr": 1e-6}, **extra)
        large = {
            name: (value.detach().clone(), value.detach().abs() > 0.01)
            for name, value in trainer.chunks[0].named_parameters()
            if value.requires_grad and value.dim() > 1
        }
        assert trainer.step()[1]
        after = dict(trainer.chunks[0].named_parameters())
        moved[rounding] = sum(int((after[name] != value)[chosen].sum()) for name, (value, chosen) in large.items())
        assert sum(int(chosen.sum()) for _, chosen in large.values()) > 10_000
    assert moved["nearest"] == 0 < 50 < moved["stochastic"]
