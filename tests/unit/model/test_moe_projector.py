"""Experts of the projector and of the tower: equal ones are what they replace, and what fills up is nobody's token."""

import pytest
import torch

from megatron_moellava.config import ProjectorMoEConfig, RunConfig, TowerMoEConfig, from_dict, set_override
from megatron_moellava.model.build import build_model
from megatron_moellava.model.moe_projector import MoEProjector
from megatron_moellava.model.roles import parameter_roles
from megatron_moellava.routing.observer import RoutingObserver

from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

TOWERS = ("clip-tiny", "naflex-tiny@pixel_shuffle", "siglip-tiny@newline")
GRIDS = {"naflex-tiny@pixel_shuffle": ((2, 4), (4, 4)), "siglip-tiny@newline": ((0, 0, 0, 0), (0, 0, 0, 0))}


def model_of(tower: str = "clip-tiny", precision: str = "fp32", **sections):
    tree: dict = {"model": {"backbone": "llama-tiny", "tower": tower}, "training": {"stage": 2}} | sections
    set_override(tree, "training.precision", precision)
    return build_model(from_dict(RunConfig, tree))[0]


def upcycled(dense, sparse) -> None:
    """Give `sparse` the weights of `dense`, each expert those of what it replaces."""
    source = dict(dense.named_parameters())
    with torch.no_grad():
        for name, parameter in sparse.named_parameters():
            if "router" not in name:
                plain = name.replace(".experts.linear", ".linear").rstrip("0123456789") if ".experts." in name else name
                parameter.copy_(source[plain])


def pictures(model, tower: str) -> tuple[torch.Tensor, tuple]:
    grids = GRIDS.get(tower, ())
    count = sum(rows * columns for rows, columns in grids) if model.tower.native else 2
    generator = torch.Generator().manual_seed(3)
    return torch.randn(count, *model.tower.pixel_shape, generator=generator), grids


@torch.no_grad()
@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("dispatcher", ["here", "all to all"])
def test_equal_experts_are_the_dense_tower_and_projector(world, tower, dispatcher):
    dense = model_of(tower)
    top1 = {"moe_router_topk": 1, "normalize_top1": True}
    for sections in (
        {"projector_moe": {}},
        {"tower_moe": {"placement": [1]}, "projector_moe": {"num_moe_experts": 3}},
        {"tower_moe": top1, "projector_moe": top1},
    ):
        sparse = model_of(tower, **sections)
        assert isinstance(sparse.projector, MoEProjector)
        upcycled(dense, sparse)
        if dispatcher == "all to all":
            for layer in (module for module in sparse.modules() if isinstance(module, MoELayer)):
                layer.token_dispatcher.__class__ = MoEAlltoAllTokenDispatcher
        pixels, grids = pictures(dense, tower)
        before, after = dense.encode_images(pixels, grids), sparse.encode_images(pixels, grids)
        assert before.shape == after.shape
        assert torch.allclose(before, after, atol=1e-6 * float(before.abs().max())), (before - after).abs().max()


def routers(model) -> list:
    found = [RoutingObserver([model], component).routers for component in ("tower", "projector")]
    return [router for by_layer in found for router in by_layer.values()]


@pytest.mark.parametrize("tower", TOWERS[::2])
def test_images_that_fill_up_make_no_loss_and_no_gradient_of_one(world, tower):
    model = model_of(tower, tower_moe={}, projector_moe={}).train()
    pixels, grids = pictures(model, tower)
    results = []
    for images, real in ((pixels[:1], None), (torch.cat([pixels[:1], pixels[1:] * 7]), 1)):
        model.zero_grad()
        model._encode(images, grids[: len(images)], real=real)[0].sum().backward()
        gradients = [router.weight.grad.clone() for router in routers(model)]
        losses = [dict(router.losses) for router in routers(model)]
        for router in routers(model):
            router.losses.clear()
        results.append((losses, gradients))
    (alone, gradients), (beside, others) = results
    assert len(alone) == model.tower.num_used_layers + 1
    for here, there in zip(alone, beside, strict=True):
        assert here.keys() == there.keys() == {"load_balancing_loss", "z_loss"}
        assert all(torch.allclose(here[name], there[name], rtol=1e-5) for name in here)
    assert all(torch.allclose(here, there, atol=1e-6) for here, there in zip(gradients, others, strict=True))


@pytest.mark.parametrize("tower", ["clip-tiny", "naflex-tiny@pixel_shuffle"])
def test_text_alone_gives_every_expert_a_gradient_of_zero(world, tower):
    """A rank without images must not train routers on a picture that is none."""
    model = model_of(tower, tower_moe={"moe_aux_loss_coeff": 10.0}, projector_moe={"moe_aux_loss_coeff": 10.0}).train()
    tokens_BS = torch.arange(8)[None]
    model.embed(tokens_BS, None).sum().backward()
    seen = [(name, p.grad) for role, name, p in parameter_roles(model) if role in ("tower", "projector")]
    assert all(grad is not None and not grad.any() for name, grad in seen if "position" not in name), seen[0]


def test_a_frozen_tower_has_no_losses(world):
    model = model_of(tower_moe={}, projector_moe={}).train()
    for parameter in model.vision_tower.parameters():
        parameter.requires_grad = False
    model.encode_images(torch.randn(2, 3, 72, 72))
    *of_tower, projector = routers(model)
    assert [router.losses for router in of_tower] == [{}] * model.tower.num_used_layers
    assert projector.losses.keys() == {"load_balancing_loss", "z_loss"}


def test_routers_are_fp32_and_know_no_bias(world):
    model = model_of(
        precision="bf16",
        moe={"moe_router_enable_expert_bias": True},
        tower_moe={},
        projector_moe={},
    )
    assert {router.weight.dtype for router in routers(model)} == {torch.float32}
    assert all(router.expert_bias is None for router in routers(model))
    assert model.projector.experts.linear_fc1.weight0.dtype == torch.bfloat16


def test_numbers_are_those_of_the_record():
    record = TowerMoEConfig(num_moe_experts=8, placement=(0, 1), moe_z_loss_coeff=None)
    mixture = record.mixture
    assert (mixture.num_moe_experts, mixture.placement, mixture.moe_z_loss_coeff) == (8, (0, 1), None)
    assert (mixture.router, mixture.moe_expert_capacity_factor, mixture.moe_aux_loss_coeff) == ("megatron", None, 0.1)
    assert ProjectorMoEConfig().mixture.placement == (0,)
