"""Which experts of a MoE checkpoint are worth a copy, when it gets more of them (Expert Upcycling, arXiv 2604.19835).

An expert whose loss would fall most by moving its weights has the largest gradient. Adam keeps a running mean of each weight's
squared gradient (`exp_avg_sq`) in a training checkpoint; an expert's utility is their sum over all of its weights. A checkpoint
without optimizer states, or whose experts were frozen, has no gradients: then the share of the tokens that chose the expert,
as the run's `routing.jsonl` last recorded it. A token count says how much an expert is used, not how much it could still learn.

Copies are given one by one, each to the expert with the largest utility per copy it has so far.
"""

from megatron_moellava.config import CheckpointError
from megatron_moellava.conversion.layout import MLP
from megatron_moellava.conversion.megatron_checkpoint import Checkpoint
from megatron_moellava.conversion.readers import open_megatron
from megatron_moellava.conversion.routing_log import ROUTING, fits, records_of, steps_of
from megatron_moellava.conversion.tensors import Files, Tensor
from megatron_moellava.costs.shapes import EXPERTS, LANGUAGE

SECOND_MOMENTS = "optimizer.state.exp_avg_sq."
GRADIENTS, TOKENS = "gradients (exp_avg_sq)", f"tokens ({ROUTING})"


def sources_by_utility(source: Checkpoint, experts: int) -> tuple[str, dict[int, list[int]]]:
    """(what the utility was taken from, for each MoE layer the old expert that each of `experts` new ones is made of).

    The old ones come first, in their order. CheckpointError when neither gradients nor routing shares are at hand.
    """
    kind, utilities = GRADIENTS, _squared_gradients(source)
    if not utilities:
        kind, utilities = TOKENS, _chosen(source)
    if not utilities:
        raise CheckpointError(
            f"--select utility: {source.folder} has no optimizer states of its experts, and {source.folder.parent} no "
            f"{ROUTING} with their load; take a checkpoint as training wrote it, or leave --select out"
        )
    return kind, {layer: greedy(values, experts) for layer, values in utilities.items()}


def greedy(utilities: list[float], experts: int) -> list[int]:
    """Utilities [8, 3, 1] and 6 experts -> [0, 1, 2, 0, 0, 1]: 8/1 is the largest, then 8/2, then 3/1."""
    sources = list(range(len(utilities)))
    copies = [1] * len(utilities)
    while len(sources) < experts:
        best = max(range(len(utilities)), key=lambda expert: (utilities[expert] / copies[expert], -expert))
        copies[best] += 1
        sources.append(best)
    return sources


def _squared_gradients(source: Checkpoint) -> dict[int, list[float]]:
    """For each MoE layer the sum of Adam's second moments of each expert; empty without them."""
    tensors, found = open_megatron(source.folder), {}
    with Files() as files:
        for layer in source.model.moe_layers:
            prefix = f"{SECOND_MOMENTS}{LANGUAGE}decoder.layers.{layer}{MLP}{EXPERTS}"
            moments = [tensor for name, tensor in tensors.items() if name.startswith(prefix)]
            if not moments:
                return {}
            sums = [_sums(files, tensor, source.model.required_moe.num_moe_experts) for tensor in moments]
            found[layer] = [sum(column) for column in zip(*sums, strict=True)]
    return found


def _sums(files: Files, tensor: Tensor, experts: int) -> list[float]:
    import torch

    size, dtype = tensor.numel // experts, getattr(torch, tensor.dtype)
    return [
        sum(
            torch.frombuffer(block, dtype=dtype).double().sum().item()
            for block in files.blocks(tensor, expert * size, size)
        )
        for expert in range(experts)
    ]


def _chosen(source: Checkpoint) -> dict[int, list[float]]:
    """For each MoE layer how many tokens chose each expert in the last recorded step; empty without a fitting record."""
    layers, experts = source.model.moe_layers, source.model.required_moe.num_moe_experts
    steps = steps_of(source.run.provenance, source.run.iteration)
    for record in reversed(records_of(source.folder.parent / ROUTING, steps)):
        if fits(record, layers, experts):
            return {row["layer"]: [float(count) for count in row["choices"]] for row in record["layers"]}
    return {}
