"""One MoE layer on this device: python -m benchmarks.gpu_moe_layer HIDDEN FFN TOKENS

Forward and backward pass in bf16, four experts, top-2, beside transformers' Mixtral block (grouped products and a loop
over experts) with the same weights, and the bound: one dense gated FFN over twice as many tokens, which is what the
experts' products cost with perfect routing. Prints one JSON object: median milliseconds, waited for, and each over the
bound.
"""

import statistics
import sys
import time
from collections.abc import Callable

import torch

from benchmarks.measure import finish
from benchmarks.moe_layer import AGREEMENT, copy_weights, mixtral, our_layer
from megatron_moellava import parallel, platform
from megatron_moellava.config import ParallelConfig

EXPERTS, TOPK, ROUNDS = 4, 2, 10


def seconds(action: Callable[[], object]) -> float:
    platform.synchronize()
    started = time.perf_counter()
    action()
    platform.synchronize()
    return time.perf_counter() - started


def output_of(layer, x_S1H: torch.Tensor) -> torch.Tensor:
    output = layer(x_S1H)
    return output[0] if isinstance(output, tuple) else output


def agreement(layers: dict[str, torch.nn.Module], x_S1H: torch.Tensor) -> float:
    """Largest median relative difference of a token's output from ours; transformers' router works in bf16."""
    with torch.no_grad():
        ours, *others = (output_of(layer, x_S1H).float() for layer in layers.values())
    return max(float(((item - ours).norm(dim=-1) / ours.norm(dim=-1)).median()) for item in others)


def main() -> None:
    hidden, ffn, tokens = map(int, sys.argv[1:])
    parallel.initialize(ParallelConfig(), seed=1)
    options = {"dtype": torch.bfloat16, "device": platform.device()}
    layers = {"ours": our_layer(hidden, ffn, EXPERTS).to(platform.device())}
    for name, implementation in (("transformers", "grouped_mm"), ("transformers, a loop", "eager")):
        layers[name] = mixtral(hidden, ffn, EXPERTS, implementation).to(platform.device())
        copy_weights(layers["ours"], layers[name])
    x_S1H = torch.randn(tokens, 1, hidden, **options).requires_grad_()
    error = agreement(layers, x_S1H)
    assert error < AGREEMENT, error
    up_FH = torch.randn(2 * ffn, hidden, **options).requires_grad_()
    down_HF = torch.randn(hidden, ffn, **options).requires_grad_()
    rows_NH = torch.randn(TOPK * tokens, hidden, **options).requires_grad_()

    def bound() -> None:
        gate_NF, inner_NF = (rows_NH @ up_FH.t()).chunk(2, dim=-1)
        ((torch.nn.functional.silu(gate_NF) * inner_NF) @ down_HF.t()).sum().backward()

    ways: dict[str, Callable[[], object]] = {
        name: lambda layer=layer: output_of(layer, x_S1H).sum().backward() for name, layer in layers.items()
    }
    ways["bound"] = bound
    found: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(-3, ROUNDS):
        for name, way in ways.items():
            took = seconds(way)
            if number >= 0:
                found[name].append(1e3 * took)
    medians = {name: statistics.median(values) for name, values in found.items()}
    over = {name: value / medians["bound"] for name, value in medians.items()}
    parallel.shutdown()
    modules = "Transformer Engine's" if platform.HAS_TRANSFORMER_ENGINE else "local"
    finish({"modules": modules, "milliseconds": medians, "over the bound": over, "relative error": error})


if __name__ == "__main__":
    main()
