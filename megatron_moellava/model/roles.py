"""Where every parameter of a built model belongs: its role (stages.py), never a piece of its name.

The original matches substrings, and "fc1" is a name in the tower too.
"""

from collections.abc import Iterator

import torch

from megatron_moellava.model.moe_llava import MoELlava
from megatron_moellava.stages import ADAPTERS

from megatron.core.transformer.moe.moe_layer import MoELayer


def parameter_roles(model: MoELlava) -> Iterator[tuple[str, str, torch.nn.Parameter]]:
    """(role, name, parameter) of every parameter of this pipeline stage, each once."""
    if model.pre_process:
        yield from _named("tower", "vision_tower", model.vision_tower)
        yield from _named("projector", "projector", model.projector)
        for branch in model.branches:
            yield from _branch_roles(branch.prefix, model)
        yield from _named("language.embedding", "language_model.embedding", model.language_model.embedding)
    decoder = model.language_model.decoder
    for index, layer in enumerate(decoder.layers):
        yield from _layer_roles(f"language_model.decoder.layers.{index}", layer)
    if decoder.final_layernorm is not None:
        yield from _named("language.norm", "language_model.decoder.final_layernorm", decoder.final_layernorm)
    if model.post_process:
        yield from _named("language.embedding", "language_model.output_layer", model.language_model.output_layer)
    if model.adapters is not None:
        yield from _named(ADAPTERS, "adapters", model.adapters)


def _branch_roles(prefix: str, model: MoELlava) -> Iterator[tuple[str, str, torch.nn.Parameter]]:
    for part, module in getattr(model, prefix.rstrip(".")).named_children():
        yield from _named(part, f"{prefix}{part}", module)


def _layer_roles(prefix: str, layer) -> Iterator[tuple[str, str, torch.nn.Parameter]]:
    yield from _named("language.attention", f"{prefix}.self_attention", layer.self_attention)
    for norm in ("input_layernorm", "pre_mlp_layernorm"):
        yield from _named("language.norm", f"{prefix}.{norm}", getattr(layer, norm))
    if not isinstance(layer.mlp, MoELayer):
        yield from _named("language.ffn", f"{prefix}.mlp", layer.mlp)
        return
    parts = {"residual_mlp": "language.ffn", "coefficient": "router", "router": "router"}
    for name, module in layer.mlp.named_children():
        yield from _named(parts.get(name, "experts"), f"{prefix}.mlp.{name}", module)


def _named(role: str, prefix: str, module: torch.nn.Module) -> Iterator[tuple[str, str, torch.nn.Parameter]]:
    for name, parameter in module.named_parameters():
        is_fused_norm = role.startswith("language.") and name.rpartition(".")[2].startswith("layer_norm_")
        yield "language.norm" if is_fused_norm else role, f"{prefix}.{name}", parameter


def freeze(model: MoELlava, trained_roles: tuple[str, ...]) -> dict[str, int]:
    """Let only these roles receive gradients. Returns the number of trained parameters of this rank per role.

    A router's expert bias has no gradient; Megatron-Core moves it by the tokens of each expert unless it is told not to.
    """
    trained: dict[str, int] = {}
    for role, _, parameter in parameter_roles(model):
        parameter.requires_grad = role in trained_roles
        if parameter.requires_grad:
            trained[role] = trained.get(role, 0) + parameter.numel()
    for layer in model.language_model.decoder.layers:
        if isinstance(layer.mlp, MoELayer):
            layer.mlp.router.frozen_expert_bias = "router" not in trained_roles
    return trained
