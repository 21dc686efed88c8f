"""Routers: capacity counts real tokens only, kinds and modules belong together, noise comes from a layer's own stream."""

import math

import pytest
import torch

from megatron_moellava import parallel
from megatron_moellava.config import MoEConfig, ParallelConfig
from megatron_moellava.data.batch import Batch
from megatron_moellava.model.build import build_model
from megatron_moellava.model.inputs import model_inputs
from megatron_moellava.model.router import (
    LayerNoise,
    MegatronRouter,
    uniform_router_init,
    within_capacity,
)
from megatron_moellava.routing.observer import RouterCall, RoutingObserver
from tests.helpers.batches import padded
from tests.helpers.inference_models import GATES, scatter, tiny_run

TOKENS = torch.randint(3, 400, (3, 20), generator=torch.Generator().manual_seed(5))
LENGTHS = (20, 7, 12)


def rows(width: int) -> Batch:
    """The same three samples, padded to any width."""
    tokens = torch.zeros(3, width, dtype=torch.int64)
    for row, length in enumerate(LENGTHS):
        tokens[row, :length] = TOKENS[row, :length]
    return padded(tokens.tolist(), torch.where(tokens > 200, tokens, -100).tolist(), [])


def routed(moe: MoEConfig, width: int) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """(losses of real tokens, maps [real tokens, E] of each router, maps of padding) of a training pass."""
    parallel.initialize(ParallelConfig(), 1)
    (model,) = build_model(tiny_run(moe))
    scatter(model)
    batch, maps = rows(width), []

    def keep(call: RouterCall) -> None:
        maps.append(call.map_NE.view(width, 3, -1).transpose(0, 1))

    with RoutingObserver([model]).watch(keep):
        losses_BS = model.train()(**model_inputs(batch)).detach()
    real_BS = batch.padding_mask_BS
    return losses_BS[real_BS], [item[real_BS] for item in maps], [item[~real_BS] for item in maps]


@pytest.mark.parametrize("bias", [False, True], ids=["softmax", "bias"])
def test_the_one_expert_of_weight_1_has_the_gradient_of_its_log_probability(bias):
    weights, gradients = {}, {}
    for normalizes in (False, True):
        parallel.initialize(ParallelConfig(), 1)
        moe = MoEConfig(moe_router_topk=1, normalize_top1=normalizes, moe_router_enable_expert_bias=bias)
        (model,) = build_model(tiny_run(moe))
        router = next(module for module in model.modules() if isinstance(module, MegatronRouter)).eval()
        logits = torch.randn(6, 1, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
        weights[normalizes], _ = router.routing(logits)
        weights[normalizes].sum().backward()
        gradients[normalizes] = logits.grad
    probability = weights[False].sum(dim=-1).detach()
    assert probability.max() < 1 and torch.equal(weights[True].sum(dim=-1), torch.ones(6))
    torch.testing.assert_close(gradients[True], gradients[False] / probability[:, None, None])


@pytest.mark.parametrize("bias", [False, True], ids=["softmax", "bias"])
@pytest.mark.parametrize("topk", [1, 2])
@pytest.mark.parametrize("factor", [0.5, 1.0, 1.5])
def test_padding_takes_no_place_at_an_expert_and_makes_none(factor, topk, bias):
    moe = MoEConfig(moe_expert_capacity_factor=factor, moe_router_topk=topk, moe_router_enable_expert_bias=bias)
    losses, maps, of_padding = routed(moe, 20)
    places = -(-sum(LENGTHS) * topk * factor // 4)
    for item in maps:
        assert (item.sum(dim=0) <= places).all()
    assert sum(int(item.sum()) for item in maps) < sum(LENGTHS) * topk * len(maps) or factor > 1, "something is dropped"
    assert not any(item.any() for item in of_padding)
    for width in (24, 33, 64):
        wider, wider_maps, of_padding = routed(moe, width)
        assert all(torch.equal(one, two) for one, two in zip(maps, wider_maps, strict=True))
        assert not any(item.any() for item in of_padding)
        torch.testing.assert_close(wider, losses, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("factor", [None, 0.5], ids=["dropless", "capacity"])
def test_an_expert_bias_counts_what_real_tokens_ask_for_and_not_what_is_left_after_dropping(factor):
    moe = MoEConfig(moe_expert_capacity_factor=factor, moe_router_enable_expert_bias=True)
    parallel.initialize(ParallelConfig(), 1)
    (model,) = build_model(tiny_run(moe))
    scatter(model)
    batch, asked = rows(33), []
    real_N = batch.padding_mask_BS.T.flatten()
    observer = RoutingObserver([model])
    with observer.watch(lambda call: asked.append(call.asked_NE[real_N].sum(dim=0))):
        model.train()(**model_inputs(batch))
    for router, counts_E in zip(observer.routers.values(), asked, strict=True):
        assert counts_E.sum() == 2 * sum(LENGTHS)
        assert torch.equal(router.local_tokens_per_expert, counts_E.float())


def test_places_go_to_the_largest_weights_of_what_is_asked_for():
    weights_NE = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4], [1.0, 1.0]])
    asked_NE = torch.tensor([[1, 0], [1, 0], [1, 0], [0, 1], [0, 0]]).bool()  # the last row is padding
    fair = torch.tensor(4 / 2, dtype=torch.float64)
    kept_NE = within_capacity(weights_NE, asked_NE, fair, factor=1.0)  # 2 places
    assert kept_NE.int().tolist() == [[1, 0], [1, 0], [0, 0], [0, 1], [0, 0]]
    assert torch.equal(within_capacity(weights_NE, asked_NE, fair, factor=9.0), asked_NE)


def test_fresh_noise_is_a_stream_of_the_layer():
    parallel.initialize(ParallelConfig(), 1)
    logits_NE = torch.zeros(5, 4)
    first, again = LayerNoise(1), LayerNoise(1)
    drawn = [first(logits_NE, torch.rand), again(logits_NE, torch.rand)]
    assert not torch.equal(*drawn), "one stream goes on"
    parallel.initialize(ParallelConfig(), 1)
    torch.rand(9)  # other generators do not matter
    assert torch.equal(LayerNoise(1)(logits_NE, torch.rand), drawn[0])
    assert not torch.equal(LayerNoise(2)(logits_NE, torch.rand), drawn[0])


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


def group_limited(bias: bool) -> MoEConfig:
    scores = {"moe_router_enable_expert_bias": True} if bias else {"moe_router_pre_softmax": True}
    return MoEConfig(num_moe_experts=8, moe_router_topk=4, moe_router_num_groups=4, moe_router_group_topk=2, **scores)


@pytest.mark.parametrize("bias", [False, True], ids=["softmax", "sigmoids with a bias"])
def test_only_experts_of_the_groups_with_the_best_pairs_are_chosen(world, bias):
    """Groups (0 1), (2 3), (4 5), (6 7); what the observers ask and what is routed are the same."""
    router = first_router(group_limited(bias)).eval()
    if bias:
        router.expert_bias.copy_(torch.linspace(-0.2, 0.2, 8))
    logits_NE = 2 * torch.randn(50, 8, generator=torch.Generator().manual_seed(2))
    scores_NE = logits_NE.sigmoid() + router.expert_bias if bias else logits_NE.softmax(-1)
    best_N2 = scores_NE.view(50, 4, 2).sum(-1).topk(2).indices
    wanted_NK = torch.cat([2 * best_N2, 2 * best_N2 + 1], dim=-1).sort().values
    assert torch.equal(router.choices(logits_NE).sort().values, wanted_NK)
    _, map_NE = router.routing(logits_NE.unsqueeze(1))
    assert torch.equal(torch.zeros_like(map_NE).scatter(1, wanted_NK, True), map_NE)


def test_weights_are_what_the_model_says_of_them(world):
    logits_SBE = 2 * torch.randn(20, 1, 8, generator=torch.Generator().manual_seed(2))
    settings = {"num_moe_experts": 8, "moe_router_topk": 3}
    sums = first_router(MoEConfig(**settings)).eval().routing(logits_SBE)[0].sum(-1)
    assert torch.allclose(sums, torch.ones(20))
    weights_NE, map_NE = first_router(MoEConfig(**settings, moe_router_pre_softmax=True)).eval().routing(logits_SBE)
    assert torch.allclose(weights_NE[map_NE], logits_SBE.view(20, 8).softmax(-1)[map_NE])
    scaled = first_router(MoEConfig(**settings, moe_router_topk_scaling_factor=2.5)).eval().routing(logits_SBE)[0]
    assert torch.allclose(scaled.sum(-1), torch.full((20,), 2.5))


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
