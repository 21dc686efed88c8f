"""The routers of a model: weights in fp32, order of tokens, the losses they attach."""

import math

import pytest
import torch

from megatron_moellava.config import MoEConfig
from megatron_moellava.model.build import build_model
from megatron_moellava.model.router import (
    LayerNoise,
    MegatronRouter,
    OriginalRouter,
    router_builder,
    uniform_router_init,
)
from tests.helpers.inference_models import GATES, tiny_run


def first_router(moe: MoEConfig, backbone: str = "llama-tiny"):
    (model,) = build_model(tiny_run(moe, backbone))
    return next(module for module in model.modules() if isinstance(module, MegatronRouter))


def test_weights_start_as_torchs_linear_does():
    torch.manual_seed(0)
    weight_EH = uniform_router_init(torch.empty(4, 100))
    assert weight_EH.abs().max() <= 0.1
    assert weight_EH.std() == pytest.approx(0.1 / math.sqrt(3), rel=0.1)


def test_routers_are_fp32_and_have_no_bias_where_the_mlps_have_one(world):
    router = first_router(MoEConfig(), "phi-2-tiny")
    assert router.config.add_bias_linear is False and router.bias is None
    assert router.weight.dtype == torch.float32


def test_the_kind_of_a_run_chooses_the_module():
    assert router_builder(MoEConfig()) is MegatronRouter
    original = router_builder(MoEConfig(router="original", moe_expert_capacity_factor=1.0))
    assert original.func is OriginalRouter and original.keywords["moe"].router == "original"


def test_probabilities_sum_to_one_over_all_experts(world):
    logits_NE = torch.randn(5, 4)
    softmax = first_router(MoEConfig())
    assert torch.allclose(softmax.probabilities(logits_NE), logits_NE.softmax(-1))
    biased = first_router(GATES["balanced by a bias"])
    assert torch.allclose(biased.probabilities(logits_NE), logits_NE.sigmoid() / logits_NE.sigmoid().sum(-1, True))


def test_an_expert_bias_changes_who_is_asked_and_not_the_probabilities(world):
    router = first_router(GATES["balanced by a bias"])
    logits_NE = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    assert router.choices(logits_NE).tolist() == [[0, 1]]
    router.expert_bias[3] += 10.0
    assert router.choices(logits_NE).tolist() == [[3, 0]]


def test_the_original_counts_places_batch_first(world):
    """Two rows of three tokens that all want expert 0, with two places: both are of the first row."""
    moe = MoEConfig(router="original", moe_router_topk=1, moe_expert_capacity_factor=1.0, min_capacity=0)
    router = first_router(moe)
    router.gate.noise = lambda logits_NE, draw: torch.arange(len(logits_NE), 0, -1.0)[:, None].expand_as(logits_NE)
    logits_SBE = torch.zeros(3, 2, 4)
    logits_SBE[..., 0] = 9.0
    _, map_NE = router.routing(logits_SBE)
    assert router.gate(logits_SBE.transpose(0, 1).reshape(-1, 4)).capacity == 2
    assert map_NE[:, 0].view(3, 2).tolist() == [[True, False], [True, False], [False, False]]


def test_the_originals_balance_loss_reaches_the_logits_by_its_coefficient(world):
    gradients = []
    for coefficient in (0.0, 0.01, 0.02):
        torch.manual_seed(0)
        router = first_router(
            MoEConfig(router="original", moe_expert_capacity_factor=4.0, moe_aux_loss_coeff=coefficient)
        )
        router.gate.noise = lambda logits_NE, draw: torch.zeros_like(logits_NE)
        logits_SBE = torch.linspace(-1, 1, 24).view(6, 1, 4).requires_grad_()
        probs_NE, _ = router.routing(logits_SBE)
        (probs_NE.sum() * 0.0).backward()
        gradients.append(logits_SBE.grad)
    assert not gradients[0].any()
    assert gradients[1].abs().max() > 0
    assert torch.allclose(2 * gradients[1], gradients[2])


def test_noise_of_a_layer_is_its_own_and_repeats_with_the_generators_state(world):
    logits_NE = torch.zeros(4, 3)
    first, second = LayerNoise(1), LayerNoise(2)
    drawn = first(logits_NE, torch.rand), second(logits_NE, torch.rand), first(logits_NE, torch.rand)
    assert not torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    before = torch.get_rng_state()
    first(logits_NE, torch.rand)
    assert torch.equal(torch.get_rng_state(), before), "the run's own generator is left alone"
