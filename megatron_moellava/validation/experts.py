"""The experts: what a router can do, and how experts are divided over processes."""

from collections.abc import Iterator
from dataclasses import replace

from megatron_moellava.backbones import Backbone
from megatron_moellava.backbones.experts import mixture_of
from megatron_moellava.config import MoEConfig, MoELlavaError, RunConfig
from megatron_moellava.costs.shapes import expert_ffn_hidden_size
from megatron_moellava.machine import Machine
from megatron_moellava.placement import moe_layers
from megatron_moellava.routers import MODALITIES, ROUTERS, RouterKind, admissible_experts, experts_by_group
from megatron_moellava.stages import adapted_roles
from megatron_moellava.validation.layout import divisors


def expert_problems(run: RunConfig, backbone: Backbone, machine: Machine) -> Iterator[str]:
    """What the experts need of the layout, of the backbone and of the kind of router."""
    moe, parallel = run.moe, run.parallel
    yield from _recomputed(run)
    if moe is None and backbone.moe is not None:
        yield f"moe is null, and {backbone.name} has experts of its own; leave moe out, and the run takes them over"
        return
    if moe is None:
        if run.training.stage == 3 and run.training.trains is None and not run.mixtures:
            yield (
                "training.stage=3 trains MoE layers, and this model has none; start from a checkpoint made by "
                "`moellava convert upcycle`" + ("" if run.checkpoint.load else ", or set moe.num_moe_experts")
            )
        if run.training.trains and {*run.training.trains} <= {"experts", "router"}:
            yield f"training.trains={list(run.training.trains)}: a dense model has no such parameters, so nothing would train"
        if parallel.expert_model_parallel_size > 1 and not run.mixtures:
            yield f"parallel.expert_model_parallel_size={parallel.expert_model_parallel_size} needs a MoE model; use 1"
        return
    if moe.num_moe_experts % parallel.expert_model_parallel_size:
        yield (
            f"parallel.expert_model_parallel_size={parallel.expert_model_parallel_size} does not divide moe.num_moe_experts="
            f"{moe.num_moe_experts}; use {divisors(moe.num_moe_experts)}"
        )
    if not 1 <= moe.moe_router_topk <= moe.num_moe_experts:
        yield f"moe.moe_router_topk={moe.moe_router_topk} must lie between 1 and moe.num_moe_experts={moe.num_moe_experts}"
    split, width = parallel.expert_tensor_parallel_size or 1, expert_ffn_hidden_size(moe, backbone)
    if width % split:
        yield (
            f"parallel.expert_tensor_parallel_size={split} does not divide the experts' width of {width} "
            f"(moe.moe_ffn_hidden_size, {backbone.name}); use {divisors(width)}"
        )
    if moe.normalize_top1 and moe.moe_router_topk > 1:
        yield (
            f"moe.normalize_top1=true with moe.moe_router_topk={moe.moe_router_topk}: the weights of several experts sum to 1 "
            "anyway; leave it unset"
        )
    try:
        moe_layers(moe.placement, backbone.num_layers)
        yield from _of_the_backbone(moe, backbone)
    except MoELlavaError as error:
        yield str(error)
    yield from _weights(moe)
    yield from _modalities(moe)
    if moe.moe_router_dtype == "bf16" and run.training.precision != "bf16":
        yield (
            f"moe.moe_router_dtype=bf16 with training.precision={run.training.precision}: the router takes the dtype of the "
            "hidden states; set training.precision=bf16, or moe.moe_router_dtype=fp32"
        )
    if (parallel.expert_tensor_parallel_size or 1) > 1 and backbone.add_bias_linear:
        yield (
            f"parallel.expert_tensor_parallel_size={parallel.expert_tensor_parallel_size}: the experts of {backbone.name} "
            "have biases, which Megatron-Core cannot split; use 1"
        )
    if moe.moe_shared_expert_intermediate_size and backbone.add_bias_linear:
        yield (
            f"moe.moe_shared_expert_intermediate_size={moe.moe_shared_expert_intermediate_size}: the MLPs of {backbone.name} "
            "have biases, which Megatron-Core's shared experts cannot; leave it unset"
        )
    shared, tensor = moe.moe_shared_expert_intermediate_size, parallel.tensor_model_parallel_size
    if shared and shared % tensor:
        yield (
            f"parallel.tensor_model_parallel_size={tensor} does not divide moe.moe_shared_expert_intermediate_size={shared}; "
            f"use {divisors(shared)}"
        )
    if moe.moe_token_dispatcher_type == "flex" and not machine.has_gpu:
        yield (
            "moe.moe_token_dispatcher_type=flex (DeepEP) needs GPUs; use alltoall, or training.device=cuda where the run will "
            "have them elsewhere"
        )
    if moe.moe_token_dispatcher_type == "flex":
        yield from _deep_ep(run, machine)
    if moe.moe_token_dispatcher_type == "allgather" and not run.data.packing:
        yield "moe.moe_token_dispatcher_type=allgather needs rows of one length (data.packing=true); use alltoall"
    yield from _router(run, ROUTERS[moe.router])


def _of_the_backbone(moe: MoEConfig, backbone: Backbone) -> Iterator[str]:
    """What contradicts the experts that the backbone's own weights have."""
    if backbone.moe is None:
        return
    own, asked = mixture_of(backbone.moe, backbone), mixture_of(moe, backbone)
    for name, value in own.items():
        if asked[name] != value:
            yield (
                f"moe.{name}={asked[name]}: {backbone.name} has experts of its own, with {value}; leave it out, and the run "
                "takes it over"
            )


def _recomputed(run: RunConfig) -> Iterator[str]:
    """What can be recomputed of experts is that of experts which are there, and which keep it."""
    training, given = run.training, f"training.recompute={run.training.recompute}"
    if training.recompute not in ("moe", "moe_act"):
        return
    if run.moe is None:
        yield f"{given}: a dense model has no experts; use none, selective or full"
    elif training.recompute == "moe_act" and not run.moe.moe_grouped_gemm:
        yield f"{given} with moe.moe_grouped_gemm=false: experts one after the other keep their activation; use moe, or set it"
    elif training.recompute == "moe_act" and training.lora and "experts" in adapted_roles(training.lora):
        yield f"{given} with training.lora beside the experts: their adapters keep what the activation made; use moe"
    elif training.recompute == "moe_act" and training.fp8_recipe == "delayed":
        yield f"{given} with training.fp8_recipe=delayed, under which Megatron-Core recomputes no activation; use moe"


def _weights(moe: MoEConfig) -> Iterator[str]:
    """Choices and weights of Megatron-Core's router that exclude each other."""
    if moe.moe_router_pre_softmax and moe.moe_router_enable_expert_bias:
        yield (
            "moe.moe_router_pre_softmax=true with moe.moe_router_enable_expert_bias=true: a router with biases has sigmoids in "
            "place of the softmax; leave one of them unset"
        )
    if moe.moe_shared_expert_gate and not moe.moe_shared_expert_intermediate_size:
        yield "moe.moe_shared_expert_gate=true: there is no shared expert; set moe.moe_shared_expert_intermediate_size as well"
    groups, chosen = moe.moe_router_num_groups, moe.moe_router_group_topk
    if (groups is None) != (chosen is None):
        yield (
            f"moe.moe_router_num_groups={groups} and moe.moe_router_group_topk={chosen} belong together; set both, or neither"
        )
        return
    if groups is None or chosen is None:
        return
    if moe.num_moe_experts % groups or not 1 <= chosen <= groups or moe.moe_router_topk < chosen:
        yield (
            f"moe.moe_router_num_groups={groups} must divide moe.num_moe_experts={moe.num_moe_experts}, and "
            f"moe.moe_router_group_topk={chosen} must lie between 1 and the smaller of it and moe.moe_router_topk="
            f"{moe.moe_router_topk}"
        )
    elif moe.moe_router_topk > chosen * (moe.num_moe_experts // groups):
        yield (
            f"moe.moe_router_topk={moe.moe_router_topk}: {chosen} groups of {moe.num_moe_experts // groups} experts have fewer"
        )
    if not moe.moe_router_pre_softmax and not moe.moe_router_enable_expert_bias:
        yield (
            f"moe.moe_router_num_groups={groups} compares sums of scores, which logits are not; set moe.moe_router_pre_softmax "
            "or moe.moe_router_enable_expert_bias"
        )


def _modalities(moe: MoEConfig) -> Iterator[str]:
    """Groups of experts by modality, and balance of each."""
    if moe.balance_per_modality and moe.moe_router_load_balancing_type == "none":
        yield "moe.balance_per_modality=true with moe.moe_router_load_balancing_type=none: there is no loss; use aux_loss"
    groups = moe.expert_groups
    if groups is None or min(groups.image, groups.text, groups.shared) < 0:  # which validation/numbers.py says
        return
    named = f"moe.expert_groups (image={groups.image}, text={groups.text}, shared={groups.shared})"
    if groups.image + groups.text + groups.shared != moe.num_moe_experts:
        yield (
            f"{named} has {groups.image + groups.text + groups.shared} experts, and moe.num_moe_experts="
            f"{moe.num_moe_experts}; they must be as many"
        )
        return
    for name, experts in zip(MODALITIES, admissible_experts(moe), strict=True):
        if len(experts) < moe.moe_router_topk:
            yield (
                f"{named} leaves {len(experts)} experts to {name} tokens, which choose moe.moe_router_topk="
                f"{moe.moe_router_topk}; give them more of their own or shared ones, or set moe.expert_groups.penalty"
            )
    if moe.moe_router_num_groups is not None:
        yield (
            f"{named} with moe.moe_router_num_groups={moe.moe_router_num_groups}: the best of groups that a token may not "
            "choose from would still be counted; leave one of them unset"
        )
    binned = replace(groups, order="binned")
    if groups.order == "dealt" and experts_by_group(groups) == experts_by_group(binned):
        yield (
            f"moe.expert_groups.order=dealt: {named} have no common divisor, so one round holds them all and nothing is "
            "dealt; use binned, or numbers such as image=4, text=4"
        )


def _deep_ep(run: RunConfig, machine: Machine) -> Iterator[str]:
    parallel = run.parallel
    if parallel.expert_model_parallel_size * (parallel.expert_tensor_parallel_size or 1) == 1:
        yield (
            "moe.moe_token_dispatcher_type=flex: with parallel.expert_model_parallel_size=1 no token leaves its GPU, and "
            "Megatron-Core refuses DeepEP; use alltoall"
        )
    if machine.has_gpu and machine.has_deep_ep is False:
        yield "moe.moe_token_dispatcher_type=flex needs the package deep_ep, which is not installed; use alltoall"


def _router(run: RunConfig, kind: RouterKind) -> Iterator[str]:
    moe, parallel = run.required_moe, run.parallel
    if kind.max_topk is not None and moe.moe_router_topk > kind.max_topk:
        yield (
            f"moe.moe_router_topk={moe.moe_router_topk}: the {kind.name} router has at most {kind.max_topk}; "
            "use moe.router=megatron"
        )
    if kind.always_has_capacity and moe.moe_expert_capacity_factor is None:
        yield f"moe.moe_expert_capacity_factor is unset: the {kind.name} router always has one; the released recipes use 1.5"
    if not kind.allows_packing and run.data.packing:
        yield f"moe.router={kind.name} counts places in padded batches; set data.packing=false"
    for name in kind.lacks:
        if getattr(moe, name):
            yield f"moe.{name}={getattr(moe, name)}: the {kind.name} router has no such thing; use moe.router=megatron"
    if moe.moe_router_load_balancing_type not in kind.balancing:
        yield (
            f"moe.moe_router_load_balancing_type={moe.moe_router_load_balancing_type}: the {kind.name} router has "
            f"{' or '.join(kind.balancing)}; use one of them, or moe.router=megatron"
        )
    if not kind.allows_context_parallelism and parallel.context_parallel_size > 1:
        yield f"parallel.context_parallel_size: the {kind.name} router counts places over the whole sequence; use 1"
    shared = parallel.tensor_model_parallel_size * parallel.context_parallel_size
    if moe.moe_expert_capacity_factor is not None and not kind.counts_whole_sequence and shared > 1:
        yield (
            f"moe.moe_expert_capacity_factor={moe.moe_expert_capacity_factor} with tensor or context parallelism: "
            "Megatron-Core counts places in each rank's share of the sequence, so the result would depend on the layout; "
            "leave it unset (dropless)"
        )
