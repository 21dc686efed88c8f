"""Routers: capacity counts real tokens only, kinds and modules belong together, noise comes from a layer's own stream."""

import pytest
import torch

from megatron_moellava import parallel
from megatron_moellava.config import MoEConfig, ParallelConfig
from megatron_moellava.data.batch import Batch
from megatron_moellava.model.build import build_model
from megatron_moellava.model.inputs import model_inputs
from megatron_moellava.model.router import LayerNoise, within_capacity
from megatron_moellava.routing.observer import RouterCall, RoutingObserver
from tests.helpers.batches import padded
from tests.helpers.inference_models import scatter, tiny_run

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
@pytest.mark.parametrize("topk", [1, 2])
@pytest.mark.parametrize("factor", [0.5, 1.0, 1.5])
def test_padding_takes_no_place_at_an_expert_and_makes_none(factor, topk, bias):
    moe = MoEConfig(capacity_factor=factor, moe_router_topk=topk, moe_router_enable_expert_bias=bias)
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
    moe = MoEConfig(capacity_factor=factor, moe_router_enable_expert_bias=True)
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
    kept_NE = within_capacity(weights_NE, asked_NE, topk=1, factor=1.0)  # ceil(4 / 2) = 2 places
    assert kept_NE.int().tolist() == [[1, 0], [1, 0], [0, 0], [0, 1], [0, 0]]
    assert torch.equal(within_capacity(weights_NE, asked_NE, topk=1, factor=9.0), asked_NE)


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
