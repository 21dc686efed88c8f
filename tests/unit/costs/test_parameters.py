"""Counts from the list of shapes against the parameters of built models, for every family and kind of expert."""

from collections import Counter
from dataclasses import replace

import pytest

from megatron_moellava import parallel
from megatron_moellava.backbones import BACKBONES, get_backbone
from megatron_moellava.config import MoEConfig, ParallelConfig
from megatron_moellava.costs.flops import Product, last_stage_work, layer_work
from megatron_moellava.costs.layout import Layout
from megatron_moellava.costs.parameters import (
    activated_parameters,
    parameters_of,
    role_of,
    token_flops,
    whole_parameters,
)
from megatron_moellava.costs.shapes import Model, model_tensors
from megatron_moellava.model.build import build_model
from megatron_moellava.model.roles import parameter_roles
from megatron_moellava.stages import ROLES
from megatron_moellava.towers import get_tower
from tests.helpers.inference_models import tiny_run

TINY = sorted(name for name in BACKBONES if name.endswith("-tiny"))
EXPERTS = {
    "dense": None,
    "experts": MoEConfig(),
    "residual": MoEConfig(use_residual=True, moe_router_enable_expert_bias=True),
    "granular": MoEConfig(num_moe_experts=8, moe_router_topk=4, moe_ffn_hidden_size=64, use_residual=True),
    "shared": MoEConfig(moe_shared_expert_intermediate_size=96, moe_grouped_gemm=False),
}


@pytest.fixture(scope="module", autouse=True)
def one_process():
    parallel.initialize(ParallelConfig(), 1)
    yield
    parallel.shutdown()


def layout_of(name: str, moe: MoEConfig | None, tower: str = "clip-tiny", **axes) -> Layout:
    run = tiny_run(moe, name)
    run = replace(run, model=replace(run.model, tower=tower), parallel=ParallelConfig(**axes))
    return Layout(run=run, backbone=get_backbone(name), tower=get_tower(tower), world_size=4)


def built(layout: Layout) -> Counter:
    """role -> elements of the modules themselves."""
    (model,) = build_model(layout.run)
    count: Counter = Counter()
    for role, _, parameter in parameter_roles(model):
        count[role] += parameter.numel()
    assert sum(count.values()) == sum(parameter.numel() for parameter in model.parameters())
    return count


def by_role(layout: Layout, *ranks: int) -> Counter:
    count: Counter = Counter()
    for rank in ranks:
        for part, number in parameters_of(layout, rank).items():
            count[role_of(part)] += number
    return count


BUILT = [  # Megatron-Core's shared experts have no biases; validation refuses them
    (name, kind) for name in TINY for kind in EXPERTS if kind != "shared" or not get_backbone(name).add_bias_linear
]


@pytest.mark.parametrize(("name", "kind"), BUILT)
def test_counts_are_those_of_the_built_model(name, kind):
    layout = layout_of(name, EXPERTS[kind])
    counted = built(layout)
    assert whole_parameters(layout.model) == counted
    assert by_role(layout, 0) == counted


def test_counts_of_the_other_tower():
    layout = layout_of("llama-tiny", None, tower="siglip-tiny")
    assert whole_parameters(layout.model) == built(layout)


def test_every_family_has_a_tiny_size_and_every_role_is_met():
    assert {get_backbone(name).hf.family for name in TINY} == {item.hf.family for item in BACKBONES.values()}
    assert set(whole_parameters(layout_of("llama-tiny", EXPERTS["residual"]).model)) == set(ROLES)


def test_a_token_passes_through_its_own_experts_alone():
    model = layout_of("llama-tiny", MoEConfig(num_moe_experts=8, moe_router_topk=2)).model
    whole, activated = whole_parameters(model), activated_parameters(model)
    assert activated["experts"] == whole["experts"] // 4 > 0
    assert all(activated[role] == whole[role] for role in ROLES if role != "experts")
    dense = Model(backbone=model.backbone, tower=model.tower)
    assert activated_parameters(dense) == whole_parameters(dense)


def test_narrow_experts_activate_as_much_as_the_whole_ones_they_are_parts_of():
    whole = layout_of("llama-tiny", MoEConfig(placement="dense")).model
    parts = layout_of(
        "llama-tiny", MoEConfig(placement="dense", num_moe_experts=16, moe_router_topk=8, moe_ffn_hidden_size=96)
    ).model
    assert whole_parameters(parts)["experts"] == whole_parameters(whole)["experts"]
    assert activated_parameters(parts)["experts"] == activated_parameters(whole)["experts"]
    added = (16 - 4) * whole.backbone.hidden_size * whole.backbone.num_layers  # rows of the routers
    assert token_flops(parts) - token_flops(whole) == 2 * added


@pytest.mark.parametrize("name", ["llama-tiny", "phi-2-tiny", "minicpm-tiny"])
@pytest.mark.parametrize("kind", ["dense", "experts", "granular"])
def test_flops_of_a_token_are_those_of_its_layers(name, kind):
    layout = layout_of(name, EXPERTS[kind])
    layers = [item for is_moe in layout.kinds_of(0) for item in layer_work(layout, is_moe, 1, 1)]
    work = [item for item in [*layers, *last_stage_work(layout, 1)] if isinstance(item, Product)]
    mixing = 2 * 2 * layout.backbone.hidden_size * len(layout.model.moe_layers) if kind == "granular" else 0
    assert token_flops(layout.model) == pytest.approx(sum(item.forward for item in work) + mixing)


@pytest.mark.parametrize("name", ["llama-tiny", "minicpm-tiny"])
def test_pipeline_ranks_hold_the_whole_model_between_them(name):
    """A weight that both ends share lies on both when the pipeline separates them."""
    layout = layout_of(name, MoEConfig(), pipeline_model_parallel_size=2)
    both = by_role(layout, 0, 1)
    if layout.backbone.share_embeddings_and_output_weights:
        both["language.embedding"] -= layout.backbone.vocab_size * layout.backbone.hidden_size
    assert both == whole_parameters(layout.model)


def test_parallel_ranks_divide_what_the_list_says():
    alone = parameters_of(layout_of("llama-tiny", EXPERTS["shared"]), 0)
    halves = parameters_of(layout_of("llama-tiny", EXPERTS["shared"], expert_model_parallel_size=2), 0)
    assert halves["experts"] * 2 == alone["experts"]
    assert all(halves[part] == alone[part] for part in alone if part != "experts")
    tensor = parameters_of(layout_of("llama-tiny", EXPERTS["shared"], tensor_model_parallel_size=2), 0)
    for part in ("language.attention", "shared experts", "language.embedding", "language.ffn"):
        assert tensor[part] * 2 == alone[part], part
    for part in ("experts", "router", "language.norm"):
        assert tensor[part] == alone[part], part


def test_a_vocabulary_that_does_not_divide_is_padded():
    odd = replace(get_backbone("llama-tiny"), vocab_size=511)
    layouts = [replace(layout_of("llama-tiny", None, tensor_model_parallel_size=size), backbone=odd) for size in (1, 2)]
    rows = 2 if not odd.share_embeddings_and_output_weights else 1
    counts = [parameters_of(layout, 0)["language.embedding"] for layout in layouts]
    assert counts == [rows * 511 * odd.hidden_size, rows * 256 * odd.hidden_size]


def test_buffers_are_in_the_list_and_in_no_count():
    model = layout_of("llama-tiny", MoEConfig(moe_router_enable_expert_bias=True)).model
    buffers = [name for name, tensor in model_tensors(model).items() if not tensor.is_parameter]
    assert buffers and all(name.endswith("router.expert_bias") for name in buffers)
