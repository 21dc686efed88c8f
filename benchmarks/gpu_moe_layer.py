"""One MoE layer on this device beside the dense products of the same size: python -m benchmarks.gpu_moe_layer HIDDEN FFN TOKENS

The bound is one dense gated FFN over K times as many tokens, as `moe_layer.py` has it: what the experts' products cost
with perfect routing. Prints one JSON object: median milliseconds of both, waited for, and
their ratio.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable

import torch

from benchmarks.moe_layer import our_layer
from megatron_moellava import parallel, platform
from megatron_moellava.config import ParallelConfig

EXPERTS, TOPK, ROUNDS = 4, 2, 10


def seconds(action: Callable[[], object]) -> float:
    platform.synchronize()
    started = time.perf_counter()
    action()
    platform.synchronize()
    return time.perf_counter() - started


def main() -> None:
    hidden, ffn, tokens = map(int, sys.argv[1:])
    parallel.initialize(ParallelConfig(), seed=1)
    device = platform.device()
    layer = our_layer(hidden, ffn, EXPERTS).to(device)
    options = {"dtype": torch.bfloat16, "device": device}
    x_S1H = torch.randn(tokens, 1, hidden, **options).requires_grad_()
    up_FH, down_HF = torch.randn(2 * ffn, hidden, **options), torch.randn(hidden, ffn, **options)
    up_FH.requires_grad_(), down_HF.requires_grad_()
    rows_NH = torch.randn(TOPK * tokens, hidden, **options).requires_grad_()

    def ours() -> None:
        layer(x_S1H)[0].sum().backward()

    def bound() -> None:
        gate_NF, inner_NF = (rows_NH @ up_FH.t()).chunk(2, dim=-1)
        ((torch.nn.functional.silu(gate_NF) * inner_NF) @ down_HF.t()).sum().backward()

    found: dict[str, list[float]] = {"ours": [], "bound": []}
    for number in range(-3, ROUNDS):
        for name, way in (("ours", ours), ("bound", bound)):
            took = seconds(way)
            if number >= 0:
                found[name].append(1e3 * took)
    medians = {f"{name}_ms": statistics.median(values) for name, values in found.items()}
    print(json.dumps(medians | {"ratio": medians["ours_ms"] / medians["bound_ms"]}))
    parallel.shutdown()


main()
