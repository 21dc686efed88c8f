"""Routing by modality: who may be chosen, what a loss, a place and a bias make of it, beside independent computations."""

import math

import pytest
import torch

from megatron_moellava.config import ExpertGroups, MoEConfig
from megatron_moellava.model.build import build_model
from megatron_moellava.model.inputs import model_inputs
from megatron_moellava.model.modality_router import ModalityRouter, marks_of
from megatron_moellava.model.router import MegatronRouter
from megatron_moellava.routing.observer import RoutingObserver
from tests.helpers.inference_models import scatter, tiny_run
from tests.helpers.modalities import DEPTH

S, B, E = 24, 2, 6
GROUPS = ExpertGroups(image=2, text=3, shared=1)  # 0 1 image, 2 shared, 3 4 5 text
OWN = {True: [0, 1, 2], False: [2, 3, 4, 5]}
IS_IMAGE_BS = torch.rand(B, S, generator=torch.Generator().manual_seed(4)) < 0.7
PADDING_BS = torch.arange(S) >= torch.tensor([[S], [S - 5]])
MARKS_SB2 = marks_of(PADDING_BS, IS_IMAGE_BS).transpose(0, 1)


def router_of(**settings) -> ModalityRouter:
    moe = MoEConfig(**{"num_moe_experts": E, "moe_router_topk": 2, "expert_groups": GROUPS, **settings})
    (model,) = build_model(tiny_run(moe))
    return next(module for module in model.modules() if isinstance(module, MegatronRouter))


def logits(seed: int = 2, experts: int = E) -> torch.Tensor:
    return 2 * torch.randn(S, B, experts, generator=torch.Generator().manual_seed(seed))


def tokens(item_SBE: torch.Tensor):
    """(is of an image, is padding, the row's number, the row [E]) of each token."""
    for s in range(S):
        for b in range(B):
            yield bool(IS_IMAGE_BS[b, s]), bool(PADDING_BS[b, s]), b, item_SBE[s, b]


@pytest.mark.parametrize("bias", [False, True], ids=["softmax", "sigmoids with a bias"])
@pytest.mark.parametrize("topk", [1, 2, 3])
def test_weights_are_those_of_a_router_with_only_the_admissible_experts(world, topk, bias):
    router = router_of(moe_router_topk=topk, moe_router_enable_expert_bias=bias).eval()
    assert isinstance(router, ModalityRouter)
    if bias:
        router.expert_bias.copy_(torch.tensor([0.0, 0.1, -0.1, 50.0, 0.2, -0.3]))  # nothing brings expert 3 to an image
    weights_NE, map_NE = router.routing(logits(), MARKS_SB2)
    for (is_image, _, _, logits_E), weights_E, map_E in zip(tokens(logits()), weights_NE, map_NE, strict=True):
        own = torch.tensor(OWN[is_image])
        scores = logits_E[own].sigmoid() if bias else logits_E[own].softmax(0)
        chosen = (scores + router.expert_bias[own] if bias else scores).topk(topk).indices
        assert sorted(own[chosen].tolist()) == map_E.nonzero().flatten().tolist()
        expected = scores[chosen] / (scores[chosen].sum() if topk > 1 else 1)
        torch.testing.assert_close(weights_E[own[chosen]], expected)
        assert weights_E.count_nonzero() == topk


def test_a_penalty_lowers_the_others_logits_and_nothing_else(world):
    soft = router_of(expert_groups=ExpertGroups(image=2, text=3, shared=1, penalty=0.75)).eval()
    shifted = logits()
    for s in range(S):
        for b in range(B):
            others = [e for e in range(E) if e not in OWN[bool(IS_IMAGE_BS[b, s])]]
            shifted[s, b, others] -= 0.75
    plain = router_of(expert_groups=None).eval()
    assert type(plain) is MegatronRouter
    for here, there in zip(soft.routing(logits(), MARKS_SB2), plain.routing(shifted), strict=True):
        assert torch.equal(here, there)
    crossing = soft.routing(logits(), MARKS_SB2)[1] & ~soft.own_2E[IS_IMAGE_BS.T.flatten().long()]
    assert crossing.any() and not crossing.all(dim=1).any()


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.5])
def test_places_are_of_an_even_spread_over_the_admissible_experts(world, factor):
    router = router_of(moe_expert_capacity_factor=factor).eval()
    _, map_NE = router.routing(logits(), MARKS_SB2)
    images = int((IS_IMAGE_BS & ~PADDING_BS).sum())
    texts = int((~IS_IMAGE_BS & ~PADDING_BS).sum())
    fair = [2 * images / 3] * 2 + [2 * images / 3 + 2 * texts / 4] + [2 * texts / 4] * 3
    asked = router_of().eval().routing(logits(), MARKS_SB2)[1] & ~PADDING_BS.T.flatten()[:, None]
    expected = [min(int(count), math.ceil(fair[e] * factor - 1e-9)) for e, count in enumerate(asked.sum(dim=0))]
    assert map_NE.sum(dim=0).tolist() == expected
    assert factor > 0.5 or sum(expected) < asked.sum(), "something is dropped"


def test_a_bias_balances_the_experts_of_a_modality_among_each_other(world):
    """All tokens but few are of images: without the fair load every image expert's bias would fall, and all alike."""
    router = router_of(moe_router_enable_expert_bias=True).train()
    _, map_NE = router.routing(logits().requires_grad_(), MARKS_SB2)
    excess_E = router.local_tokens_per_expert
    assert float(excess_E.sum()) == pytest.approx(0.0, abs=1e-4)
    images, texts = (int((mask & ~PADDING_BS).sum()) for mask in (IS_IMAGE_BS, ~IS_IMAGE_BS))
    asked_E = (map_NE & ~PADDING_BS.T.flatten()[:, None]).sum(dim=0)
    fair_E = torch.tensor([2 * images / 3] * 2 + [2 * images / 3 + texts / 2] + [texts / 2] * 3)
    torch.testing.assert_close(excess_E, asked_E - fair_E)


def definition(kind: str, apart: bool, groups: bool, logits_SBE: torch.Tensor) -> torch.Tensor:
    """The balancing loss from its formula, token by token: mean over rows (of `seq_aux_loss`; else all tokens are one) of
    sum over modalities of share of the tokens * E_m * sum_e(share of the choices * mean probability)."""
    rows: dict[int, list] = {}
    for is_image, is_padding, row, logits_E in tokens(logits_SBE):
        own = OWN[is_image] if groups else list(range(E))
        probabilities = torch.zeros(E).index_add(0, torch.tensor(own), logits_E[own].softmax(0))
        if not is_padding:
            rows.setdefault(row if kind == "seq_aux_loss" else 0, []).append((is_image, probabilities, len(own)))
    losses = []
    for found in rows.values():
        parts = [[item for item in found if item[0] == which] for which in (False, True)] if apart else [found]
        loss = torch.zeros(())
        for part in parts:
            probabilities_TE = torch.stack([item[1] for item in part])
            choices = probabilities_TE.topk(2, dim=1).indices.flatten()
            share_E = torch.bincount(choices, minlength=E) / len(choices)
            experts = part[0][2] if apart else E
            loss = loss + len(part) / len(found) * experts * (share_E * probabilities_TE.mean(dim=0)).sum()
        losses.append(loss)
    return torch.stack(losses).mean()


@pytest.mark.parametrize("kind", ["aux_loss", "seq_aux_loss", "global_aux_loss"])
@pytest.mark.parametrize(("apart", "groups"), [(True, True), (True, False), (False, True)])
def test_the_balancing_loss_is_its_formula_and_so_is_its_gradient(world, kind, apart, groups):
    options = {"expert_groups": GROUPS if groups else None, "balance_per_modality": apart}
    router = router_of(moe_router_load_balancing_type=kind, moe_aux_loss_coeff=0.3, **options).train()
    given = logits().requires_grad_()
    (router.routing(given, MARKS_SB2)[0].sum() * 0.0).backward()
    wanted = logits().requires_grad_()
    loss = definition(kind, apart, groups, wanted)
    (0.3 * loss).backward()
    assert float(router.losses["load_balancing_loss"]) == pytest.approx(float(loss), rel=1e-5)
    torch.testing.assert_close(given.grad, wanted.grad, rtol=1e-4, atol=1e-7)
    assert given.grad.abs().max() > 1e-5


@pytest.mark.parametrize("groups", [GROUPS, None], ids=["groups", "all"])
def test_it_is_one_where_each_modality_is_spread_evenly(world, groups):
    """2 of 3 image experts, 2 of 4 text experts, in turn, with equal probabilities."""
    router = router_of(expert_groups=groups, balance_per_modality=True).train()
    logits_SBE, turn = torch.zeros(S, B, E), {True: 0, False: 0}
    real = [(s, b) for s in range(S) for b in range(B) if not PADDING_BS[b, s]]
    for s, b in real:
        is_image = bool(IS_IMAGE_BS[b, s])
        own = OWN[is_image] if groups else list(range(E))
        for choice in range(2):
            logits_SBE[s, b, own[(turn[is_image] + choice) % len(own)]] = 1e-4
        turn[is_image] += 2
    router.routing(logits_SBE.requires_grad_(), MARKS_SB2)
    assert float(router.losses["load_balancing_loss"]) == pytest.approx(1.0, abs=0.01)


def test_the_z_loss_counts_admissible_experts_alone(world):
    router = router_of(moe_z_loss_coeff=0.1, moe_router_load_balancing_type="none").train()
    given = logits().requires_grad_()
    (router.routing(given, MARKS_SB2)[0].sum() * 0.0).backward()
    squares = [row[OWN[im]].logsumexp(0) ** 2 for im, pad, _, row in tokens(logits()) if not pad]
    assert float(router.losses["z_loss"]) == pytest.approx(float(torch.stack(squares).mean()), rel=1e-5)
    assert given.grad.isfinite().all() and given.grad.abs().max() > 0


def test_every_router_of_a_model_is_told_which_tokens_are_of_an_image(world):
    """Through the whole model, with padded rows; what observers see is what was routed."""
    from tests.distributed.rows import micro_batches

    (model,) = build_model(tiny_run(MoEConfig(num_moe_experts=E, expert_groups=GROUPS, placement="dense")))
    scatter(model)
    batch = micro_batches("padded", 400, model.tower, DEPTH, 1)[0]
    is_image_N = (batch.tokens_BS == -200).T.flatten()
    assert 0 < is_image_N.sum() < len(is_image_N)
    seen = []

    def keep(call):
        allowed_NE = call.router.own_2E[is_image_N.long()]
        assert not (call.map_NE & ~allowed_NE).any()
        assert not call.probabilities_NE[~allowed_NE].any() and call.product_NE.isfinite().all()
        asked_NE = torch.zeros_like(call.map_NE).scatter(1, call.router.choices(call.logits_NE), True)
        assert torch.equal(asked_NE, call.map_NE)
        seen.append(call.map_NE.sum(dim=0))

    with RoutingObserver([model]).watch(keep):
        model.train()(**model_inputs(batch)).sum().backward()
    assert len(seen) == model.backbone.num_layers and all((counts_E > 0).all() for counts_E in seen)
