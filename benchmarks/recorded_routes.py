"""Uneven experts: the loads of real runs in the MoE layer, and what they mean for expert-parallel ranks.

  python -m benchmarks.recorded_routes                       measure what benchmarks/routes.json holds
  python -m benchmarks.recorded_routes --take RUN --name N   put the newest loads of a run there (its routing.jsonl)

Of each run, the layer with the busiest expert: forward and backward of ours, in bf16, with choices drawn by the recorded loads,
beside the same with every expert equally likely. Of all its layers: the busiest of 2, 4, ... ranks over the mean as the experts
lie, and with the places of `moellava convert place-experts` (arithmetic on the loads; no ranks run).
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import fmean

import torch

from benchmarks.measure import finish, median, ratio, say, take_turns
from benchmarks.moe_layer import our_layer, trainer_of
from megatron_moellava import parallel
from megatron_moellava.checkpoint.description import read_description
from megatron_moellava.checkpoint.folders import newest_checkpoint
from megatron_moellava.config import ParallelConfig
from megatron_moellava.conversion.routing_log import ROUTING, asked_for, records_of, steps_of
from megatron_moellava.costs.expert_places import busiest_over_mean, level_order

ROUTES = Path(__file__).with_name("routes.json")
RECORDS = 20  # the newest observations
TOKENS, HIDDEN, FFN = 8192, 512, 1408


def take(run: Path, name: str) -> None:
    """Sum the newest loads of a run by layer into routes.json: those of its experts' last places."""
    checkpoint = newest_checkpoint(run)
    placed_at = read_description(checkpoint).provenance if checkpoint else {}
    records = records_of(run / ROUTING, steps_of(placed_at, sys.maxsize))[-RECORDS:]
    if not records:
        raise SystemExit(f"{run} holds no {ROUTING} of a run with experts (logging.routing_interval writes it)")
    layers = {str(layer): loads_E for layer, loads_E in asked_for(records).items()}
    routes = json.loads(ROUTES.read_text()) if ROUTES.exists() else {}
    routes[name] = {"topk": records[-1]["topk"], "layers": layers}
    ROUTES.write_text(json.dumps(routes, indent=1) + "\n")


def draws(loads_E: list[float], topk: int, generator: torch.Generator) -> torch.Tensor:
    """[TOKENS, 1, E] logits whose top-k are drawn without replacement by the loads."""
    weights_E = torch.tensor(loads_E, dtype=torch.float64).clamp(min=1e-9)
    uniform_NE = torch.rand(TOKENS, len(loads_E), generator=generator, dtype=torch.float64)
    return (weights_E.log() - (-uniform_NE.log()).log()).float()[:, None]


def busiest_layer(layers: dict[str, list[int]]) -> list[int]:
    return max(layers.values(), key=lambda loads_E: max(loads_E) / sum(loads_E))


def layer_times(loads_E: list[int], topk: int, rounds: int) -> dict:
    """Milliseconds with the recorded loads and with even ones, taking turns."""
    layer = our_layer(HIDDEN, FFN, len(loads_E), topk=topk).train()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(TOKENS, 1, HIDDEN, generator=generator).bfloat16().requires_grad_()
    gradient = torch.randn(x.shape, generator=generator).bfloat16()
    step = trainer_of(layer, x, gradient)
    ways = {}
    for name, loads in (("recorded", loads_E), ("even", [1] * len(loads_E))):
        logits = draws(loads, topk, generator)

        def way(logits=logits) -> None:
            layer.router.gating = lambda input_SBH: logits
            step()

        ways[name] = way
    seconds = take_turns(ways, rounds)
    return {
        "milliseconds": {name: 1000 * median(values) for name, values in seconds.items()},
        "recorded over even": ratio(seconds["recorded"], seconds["even"]),
    }


def rank_loads(layers: dict[str, list[int]]) -> dict:
    """ranks -> mean over layers of the busiest rank over the mean, as the experts lie and placed anew."""
    experts = len(next(iter(layers.values())))
    divisors = [2**power for power in range(1, experts.bit_length()) if experts % 2**power == 0]
    return {str(ranks): mean_of_layers(list(layers.values()), ranks) for ranks in divisors}


def mean_of_layers(layers: list[list[int]], ranks: int) -> dict[str, float]:
    orders = [level_order(loads_E, ranks, [()] * len(loads_E)) for loads_E in layers]
    placed = [[loads_E[expert] for expert in order] for loads_E, order in zip(layers, orders, strict=True)]
    ways = {"as they lie": layers, "placed": placed}
    return {way: fmean(busiest_over_mean(loads_E, ranks) for loads_E in found) for way, found in ways.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--take", type=Path, metavar="RUN", help="take the loads of this run, and measure nothing")
    parser.add_argument("--name", help="what to call it, with --take")
    args = parser.parse_args()
    if bool(args.take) != bool(args.name):
        parser.error("--take and --name go together")
    if args.take:
        take(args.take, args.name)
    else:
        measure(args.rounds)


def measure(rounds: int) -> None:
    parallel.initialize(ParallelConfig(), 1)
    runs = {}
    for name, route in json.loads(ROUTES.read_text()).items():
        loads_E = busiest_layer(route["layers"])
        times = layer_times(loads_E, route["topk"], rounds)
        runs[name] = {
            "experts": len(loads_E),
            "topk": route["topk"],
            "busiest expert": max(loads_E) * len(loads_E) / sum(loads_E),
            **times,
            "ranks": rank_loads(route["layers"]),
        }
        say(f"{name}: {times['recorded over even']:.2f} x the time of even loads")
    parallel.shutdown()
    finish({"tokens": TOKENS, "hidden": HIDDEN, "ffn": FFN, "runs": runs})


if __name__ == "__main__":
    main()
