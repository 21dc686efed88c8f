"""One MoE layer, forward and backward in bf16: ours beside other ways to compute it, in the same run.

  python -m benchmarks.moe_layer [--hidden 512] [--ffn 1408] [--rounds 5] [--deepspeed FOLDER]

ours          Megatron-Core's MoE layer with this package's router and grouped experts, as a training run builds it
compiled      the same with training.compile=true
sequential    ours with one product per expert (`moe.moe_grouped_gemm=false`)
transformers  Mixtral's sparse block, as `from_pretrained` gives it (grouped products) and eager (a loop over experts)
DeepSpeed     its gate and dispatch: einsum over [tokens, experts, slots] (0.18, as in the original's 0.9), and its newest
              release, which no longer does so; capacity factor 1.5, as in the original's recipes
bound         the products alone: the same FLOPs as two dense matrices, forward and backward, no gating, no activation
by expert     the products alone, each expert's with its own weights and as many rows as the next: what the weights cost that
              are read twice and whose gradients are written once

Where no token is dropped the outputs must agree; sizes and token counts are in the result.
"""

import argparse
import importlib.metadata
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from benchmarks.measure import finish, keep_kernels, median, ratio, say, take_turns
from megatron_moellava import parallel
from megatron_moellava.backbones import get_backbone
from megatron_moellava.compiled import compile_elementwise
from megatron_moellava.config import ModelConfig, MoEConfig, ParallelConfig, RunConfig, TrainingConfig
from megatron_moellava.model.configuration import transformer_config
from megatron_moellava.model.moe_llava import LanguageModel

CAPACITY_FACTOR = 1.5
TOP_K = 2
AGREEMENT = 0.02  # relative error of two bf16 results of a token; measured: 0.005


def our_layer(hidden: int, ffn: int, experts: int, grouped: bool = True, topk: int = TOP_K) -> torch.nn.Module:
    """The MoE layer of a one-layer Llama of this size."""
    backbone = replace(
        get_backbone("llama-tiny"),
        num_layers=1,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=hidden // 64,
        num_query_groups=hidden // 64,
        kv_channels=64,
    )
    run = RunConfig(
        model=ModelConfig(backbone="llama-tiny"),
        moe=MoEConfig(num_moe_experts=experts, moe_router_topk=topk, placement="dense", moe_grouped_gemm=grouped),
        training=TrainingConfig(stage=3, precision="bf16"),
    )
    model = LanguageModel(run, backbone, transformer_config(backbone, run), True, True, None)
    return model.decoder.layers[0].mlp


def copy_weights(ours, other) -> None:
    """Experts and router of `ours` into a sequential layer or a Mixtral block."""
    state = ours.state_dict()
    count = ours.config.num_moe_experts
    fc1, fc2 = ([state[f"experts.{name}.weight{i}"] for i in range(count)] for name in ("linear_fc1", "linear_fc2"))
    with torch.no_grad():
        if hasattr(other, "gate"):
            other.gate.weight.copy_(state["router.weight"])
            other.experts.gate_up_proj.copy_(torch.stack(fc1))
            other.experts.down_proj.copy_(torch.stack(fc2))
            return
        other.router.weight.copy_(state["router.weight"])
        for index, expert in enumerate(other.experts.local_experts):
            expert.linear_fc1.weight.copy_(fc1[index])
            expert.linear_fc2.weight.copy_(fc2[index])


def mixtral(hidden: int, ffn: int, experts: int, implementation: str) -> torch.nn.Module:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=hidden,
        intermediate_size=ffn,
        num_local_experts=experts,
        num_experts_per_tok=TOP_K,
        experts_implementation=implementation,
    )
    assert config._experts_implementation == implementation
    return MixtralSparseMoeBlock(config).to(torch.bfloat16)


class SwiGLU(torch.nn.Module):
    """One expert, with the same products as ours."""

    def __init__(self, hidden: int, ffn: int):
        super().__init__()
        self.gate_up = torch.nn.Linear(hidden, 2 * ffn, bias=False)
        self.down = torch.nn.Linear(ffn, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


def import_deepspeed(folder: Path | None):
    """deepspeed's MoE class and version, from `folder` or the environment; one release after another in one process."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "deepspeed"]:
        del sys.modules[name]
    if folder is not None:
        sys.path.insert(0, str(folder))
    try:
        import deepspeed
        from deepspeed.moe import sharded_moe
        from deepspeed.moe.layer import MoE
        from deepspeed.utils import logger
    except ModuleNotFoundError as error:
        raise SystemExit(
            f"no usable deepspeed in {folder or sys.prefix} ({error}); `make bench` installs both releases into .bench-venv"
        ) from None
    finally:
        if folder is not None:
            sys.path.remove(str(folder))
    logger.setLevel("ERROR")
    # Its communication wants compiled code; a group of one has nothing to send.
    sharded_moe._AllToAll = SimpleNamespace(apply=lambda group, tensor: tensor)
    return MoE, deepspeed.__version__


def deepspeed_layer(moe_class, hidden: int, ffn: int, experts: int) -> torch.nn.Module:
    """As MoE-LLaVA builds it."""
    layer = moe_class(hidden, SwiGLU(hidden, ffn), experts, k=TOP_K, capacity_factor=CAPACITY_FACTOR, min_capacity=0)
    return layer.to(torch.bfloat16)


def trainer_of(layer, x: torch.Tensor, gradient: torch.Tensor):
    """Forward and backward of one step, gradients of weights and of the input."""
    parameters = [parameter for parameter in layer.parameters() if parameter.requires_grad]

    def step() -> None:
        output = layer(x)
        output = output[0] if isinstance(output, tuple) else output
        torch.autograd.grad(output, [x, *parameters], gradient, allow_unused=True)

    return step


def compiled(step):
    """The same step with its element-wise functions compiled."""

    def run() -> None:
        compile_elementwise(True)
        step()
        compile_elementwise(False)

    return run


def bound(tokens: int, hidden: int, ffn: int):
    """The six products of two dense layers over tokens x top-k rows, without autograd."""
    rows = tokens * TOP_K
    x, inner = torch.randn(rows, hidden).bfloat16(), torch.randn(rows, ffn).bfloat16()
    up, down = torch.randn(hidden, 2 * ffn).bfloat16(), torch.randn(ffn, hidden).bfloat16()
    grad_inner, grad_out = torch.randn(rows, 2 * ffn).bfloat16(), torch.randn(rows, hidden).bfloat16()

    def step() -> None:
        x @ up
        inner @ down
        grad_out @ down.T
        inner.T @ grad_out
        grad_inner @ up.T
        x.T @ grad_inner

    return step


def bound_by_expert(tokens: int, hidden: int, ffn: int, experts: int):
    """The six products of each expert, without autograd, into results that are there already."""
    rows = tokens * TOP_K // experts
    shapes = {"x": (rows, hidden), "inner": (rows, ffn), "grad_inner": (rows, 2 * ffn), "grad_out": (rows, hidden)}
    own = [{name: torch.randn(shape).bfloat16() for name, shape in shapes.items()} for _ in range(experts)]
    weights = [(torch.randn(2 * ffn, hidden).bfloat16(), torch.randn(hidden, ffn).bfloat16()) for _ in range(experts)]
    gradients = [tuple(torch.empty_like(weight) for weight in pair) for pair in weights]
    results = [torch.empty(rows, size).bfloat16() for size in (2 * ffn, hidden, ffn, hidden)]

    def step() -> None:
        for part, (up, down), (to_up, to_down) in zip(own, weights, gradients, strict=True):
            torch.mm(part["x"], up.t(), out=results[0])
            torch.mm(part["inner"], down.t(), out=results[1])
            torch.mm(part["grad_out"], down, out=results[2])
            torch.mm(part["grad_out"].t(), part["inner"], out=to_down)
            torch.mm(part["grad_inner"], up, out=results[3])
            torch.mm(part["grad_inner"].t(), part["x"], out=to_up)

    return step


def check_agreement(layers: dict[str, torch.nn.Module], x: torch.Tensor) -> float:
    """Largest median over tokens of an output's relative difference from ours, which must be a rounding error.

    The median: transformers' router works in bf16, and sends some tokens to other experts.
    """
    with torch.no_grad():
        outputs = {name: layer(x) for name, layer in layers.items()}
    outputs = {name: (item[0] if isinstance(item, tuple) else item).float() for name, item in outputs.items()}
    ours = outputs["ours"]
    worst = max(float(((item - ours).norm(dim=-1) / ours.norm(dim=-1)).median()) for item in outputs.values())
    assert worst < AGREEMENT, worst
    return worst


def measure(tokens: int, experts: int, args, rivals: tuple[str, ...], deepspeed: dict) -> dict:
    """Medians of one size, in milliseconds, and what each way takes beside ours."""
    torch.manual_seed(1)
    hidden, ffn = args.hidden, args.ffn
    ours = our_layer(hidden, ffn, experts)
    exact = {
        "ours": lambda: ours,
        "sequential": lambda: our_layer(hidden, ffn, experts, grouped=False),
        "transformers": lambda: mixtral(hidden, ffn, experts, "grouped_mm"),
        "transformers eager": lambda: mixtral(hidden, ffn, experts, "eager"),
    }
    layers = {name: make() for name, make in exact.items() if name in ("ours", *rivals)}
    for layer in layers.values():
        if layer is not ours:
            copy_weights(ours, layer)
    x = torch.randn(tokens, 1, hidden, dtype=torch.bfloat16, requires_grad=True)
    error = check_agreement(layers, x)
    layers |= {
        name: deepspeed_layer(moe_class, hidden, ffn, experts)
        for name, (moe_class, _) in deepspeed.items()
        if name in rivals
    }
    gradient = torch.randn_like(x)
    ways = {name: trainer_of(layer.train(), x, gradient) for name, layer in layers.items()}
    ways["compiled"] = compiled(ways["ours"])
    if "bound" in rivals:
        ways["bound"] = bound(tokens, hidden, ffn)
        ways["by expert"] = bound_by_expert(tokens, hidden, ffn, experts)
    seconds = take_turns(ways, args.rounds)
    result = {
        "tokens": tokens,
        "experts": experts,
        "milliseconds": {name: 1000 * median(values) for name, values in seconds.items()},
        "times ours": {name: ratio(values, seconds["ours"]) for name, values in seconds.items() if name != "ours"},
        "times compiled": {name: ratio(values, seconds["compiled"]) for name, values in seconds.items()},
        "relative error": error,
    }
    say(
        f"{tokens:6} tokens, {experts:2} experts: "
        + ", ".join(f"{n} {v:.0f} ms" for n, v in result["milliseconds"].items())
    )
    return result


PLAN = (  # tokens, experts, who takes part; the einsum's memory grows with the square of the tokens
    (1024, 8, ("bound", "sequential", "transformers", "deepspeed einsum", "deepspeed newest")),
    (2048, 8, ("bound", "sequential", "transformers", "deepspeed einsum", "deepspeed newest")),
    (4096, 8, ("bound", "sequential", "transformers", "deepspeed einsum", "deepspeed newest")),
    (8192, 8, ("bound", "sequential", "transformers", "transformers eager", "deepspeed einsum", "deepspeed newest")),
    (16384, 8, ("bound", "sequential", "transformers", "deepspeed newest")),
    (8192, 4, ("bound", "sequential", "transformers", "transformers eager", "deepspeed newest")),
    (8192, 16, ("bound", "sequential", "transformers", "transformers eager", "deepspeed newest")),
    (8192, 64, ("bound", "sequential", "transformers", "transformers eager", "deepspeed newest")),
    (1024, 64, ("bound", "sequential", "transformers", "transformers eager", "deepspeed newest")),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--ffn", type=int, default=1408)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--most-tokens", type=int, default=16384)
    parser.add_argument("--deepspeed", type=Path, help="folder with a second deepspeed, whose dispatch is an einsum")
    args = parser.parse_args()
    keep_kernels()
    parallel.initialize(ParallelConfig(), 1)
    deepspeed = {}
    if any(importlib.metadata.distributions(name="deepspeed")):
        deepspeed["deepspeed newest"] = import_deepspeed(None)
    if args.deepspeed is not None:
        deepspeed["deepspeed einsum"] = import_deepspeed(args.deepspeed)
    rows = [measure(*row, args, rivals, deepspeed) for *row, rivals in PLAN if row[0] <= args.most_tokens]
    parallel.shutdown()
    finish(
        {
            "hidden": args.hidden,
            "ffn": args.ffn,
            "top-k": TOP_K,
            "deepspeed": {name: version for name, (_, version) in deepspeed.items()},
            "rows": rows,
        }
    )


if __name__ == "__main__":
    main()
