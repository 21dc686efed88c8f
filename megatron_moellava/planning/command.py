"""tools/plan.py: from a command line to a report, a picture, JSON, and a dry run."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

from megatron_moellava.backbones import get_backbone
from megatron_moellava.config import ConfigError, MoEConfig, RunConfig, load_config
from megatron_moellava.planning import report
from megatron_moellava.planning.activations import activations_of
from megatron_moellava.planning.flops import stage_work
from megatron_moellava.planning.hardware import GIB, get_gpu
from megatron_moellava.planning.layout import Layout
from megatron_moellava.planning.memory import state_bytes
from megatron_moellava.planning.parameters import parameters_of
from megatron_moellava.planning.picture import draw, label
from megatron_moellava.planning.search import Found, Plan, Request, search
from megatron_moellava.planning.workload import STAGE_DATA
from megatron_moellava.towers import get_tower


def plan(arguments: argparse.Namespace) -> str:
    """Search, write the picture and the JSON file, and return the text. Raises ConfigError when nothing fits."""
    given = settings_of(arguments)
    request = request_of(arguments, given)
    found = search(request)
    best = found.plans[: arguments.top]
    if not best:
        raise ConfigError(why_nothing(request, found))
    text = report.text_report(request, found, best, given)
    title = f"{request.backbone.name}, stage {arguments.stage}, {arguments.gpus} {arguments.gpu}"
    draw(best, request.limit, title, Path(arguments.picture))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(report.json_report(request, best, given), indent=1) + "\n")
    return text + ("\n\n" + dry_run(best[0]) if arguments.dry_run else "")


def settings_of(arguments: argparse.Namespace) -> list[str]:
    """The command line as settings of the run: flags first, so that an override wins."""
    flags = {
        "moe.num_experts": arguments.num_experts,
        "data.seq_length": arguments.seq_length,
        "training.global_batch_size": arguments.global_batch_size,
    }
    return [f"{name}={value}" for name, value in flags.items() if value] + arguments.overrides


def request_of(arguments: argparse.Namespace, given: list[str]) -> Request:
    data = STAGE_DATA[arguments.stage]
    if arguments.samples:
        data = replace(data, name="given", samples=arguments.samples)
    if arguments.tokens_per_sample:
        tower = get_tower(arguments.tower)
        text = max(arguments.tokens_per_sample - data.images * tower.num_features, 0.0)
        data = replace(data, text_tokens=text)
    named = [
        f"model.backbone={arguments.backbone}",
        f"model.tower={arguments.tower}",
        f"training.stage={arguments.stage}",
        f"training.global_batch_size={data.global_batch_size}",
    ]
    run = load_config(arguments.config, [*named, *given] if arguments.config is None else [*named[:3], *given])
    fixed = frozenset(item.partition("=")[0] for item in given)
    return Request(
        run=_with_experts(run),
        backbone=get_backbone(run.model.backbone),
        tower=get_tower(run.model.tower),
        gpu=get_gpu(arguments.gpu),
        world_size=arguments.gpus,
        data=data,
        fixed=fixed,
        imbalance=arguments.imbalance,
        memory_limit=arguments.memory_limit * GIB if arguments.memory_limit else None,
    )


def _with_experts(run: RunConfig) -> RunConfig:
    """Stage 3 has experts even if no setting says how many."""
    return replace(run, moe=MoEConfig()) if run.training.stage == 3 and run.moe is None else run


def why_nothing(request: Request, found: Found) -> str:
    if found.too_big:
        memory, smallest = found.too_big[0]
        return (
            f"no layout of {request.backbone.name} fits {request.world_size} {request.gpu.name}: the smallest "
            f"({label(smallest)}) needs {memory.total / GIB:.1f} GiB per rank, {request.limit / GIB:.1f} are there; "
            "use more GPUs, a shorter data.seq_length, or fewer experts"
        )
    return "no layout is valid; of the first one tried:\n" + "\n".join(found.refused)


def dry_run(best: Plan) -> str:
    """Build and run every distinct rank of the best plan on fake tensors; counted beside predicted."""
    from megatron_moellava.planning.dry_run import count_rank

    layout = best.layout
    lines = [
        f"dry run of {label(layout)}: the full-size model of each pipeline stage on fake tensors, balanced routing, CPU modules",
        "(their activations differ from the GPU's: the tables above plan with Transformer Engine's)",
    ]
    for rank in range(layout.pp):
        lines += ["", report.comparison(rank, count_rank(layout, rank), predicted_counts(layout, rank))]
    return "\n".join(lines)


def predicted_counts(layout: Layout, rank: int) -> dict[str, float]:
    """What `dry_run.Counted` counts, as the formulas have it. Parameters are summed."""
    weights, gradients, optimizer = state_bytes(layout, rank)
    length = layout.run.data.seq_length
    work = list(stage_work(layout, rank, layout.tokens, length, layout.images))
    return {
        "num_parameters": sum(parameters_of(layout, rank).values()),
        "weights": weights,
        "gradients": gradients,
        "optimizer": optimizer,
        "activations": activations_of(layout, rank, "local").total,
        "forward_flops": sum(item.forward for item in work),
        "backward_flops": sum(item.backward for item in work) + recomputed_flops(layout, rank, work),
    }


def recomputed_flops(layout: Layout, rank: int, work: list) -> float:
    """Forward FLOPs that the backward pass repeats."""
    mode = layout.run.training.recompute
    again = {"none": (), "selective": (), "moe": ("router", "experts", "shared experts")}
    if mode == "full":
        decoder = [item for item in work if getattr(item, "part", "attention") not in ("tower", "projector", "output")]
        return sum(item.forward for item in decoder if getattr(item, "causal", True))
    return sum(item.forward for item in work if getattr(item, "part", "") in again[mode])
