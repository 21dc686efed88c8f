"""Plans as text and as JSON. Everything in them is a prediction, and says so."""

from collections.abc import Sequence
from dataclasses import asdict

import yaml

from megatron_moellava.config import MoEConfig, read_yaml, set_override, split_override
from megatron_moellava.costs.gpus import GIB
from megatron_moellava.costs.parameters import activated_parameters, token_flops, whole_parameters
from megatron_moellava.costs.shapes import Model
from megatron_moellava.planning.picture import label, time_parts
from megatron_moellava.planning.pictures import num_frames
from megatron_moellava.planning.search import Found, Plan, Request
from megatron_moellava.stages import LANGUAGE as LANGUAGE_ROLES

COLUMNS = ("layout", "GiB/rank", "s/step", "compute", "comm.", "bubble", "MFU", "steps", "hours", "GPU-hours")
MEGA, GIGA = 1e6, 1e9


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns, the first to the left."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = []
    for row in [header, *rows]:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells))
    return "\n".join(lines)


def plan_row(plan: Plan) -> tuple[str, ...]:
    """One row of the table of plans: GiB, seconds, shares, MFU, steps, hours, GPU-hours."""
    costs = plan.costs
    return (
        label(plan.layout),
        f"{plan.memory.total / GIB:.1f}",
        f"{costs.step_seconds:.2f}",
        f"{costs.compute_seconds / costs.step_seconds:.0%}",
        f"{costs.communication_seconds / costs.step_seconds:.0%}",
        f"{costs.bubble:.0%}",
        f"{costs.mfu:.1%}",
        f"{costs.steps:,}",
        f"{costs.hours:.1f}",
        f"{costs.gpu_hours:,.1f}",
    )


def settings_line(plan: Plan, given: Sequence[str]) -> str:
    """What to paste behind moellava train: the request's own settings, then the planner's."""
    chosen = [f"{path}={value}" for path, value in plan.settings.items()]
    names = {item.partition("=")[0] for item in chosen}
    return " ".join([*(item for item in given if item.partition("=")[0] not in names), *chosen])


def yaml_report(plan: Plan, config: str | None, given: Sequence[str]) -> str:
    """The run of a plan as a file that `moellava train --config` takes."""
    tree = read_yaml(config) if config else {}
    for item in [*given, *(f"{path}={value}" for path, value in plan.settings.items())]:
        set_override(tree, *split_override(item))
    return yaml.safe_dump(tree, sort_keys=False)


def text_report(request: Request, found: Found, best: Sequence[Plan], given: Sequence[str]) -> str:
    """Table of the best plans, their settings, and where the first one's memory goes."""
    run, data = request.run, request.data
    tokens = data.text_tokens + data.shown(request.tower, run.data).tokens
    model = language_model(request)
    lines = [
        f"Predictions for {request.backbone.name}, stage {run.training.stage} on {request.world_size} {request.gpu.name}: "
        f"{data.name}, {data.samples:,} samples of {tokens:,.0f} tokens ({data.images:.2f} images{_videos(request)}).",
        f"Rows of {run.data.seq_length:,} tokens, {'packed' if run.data.packing else 'padded'}"
        + (
            f"; {run.moe.num_moe_experts} experts{_width(run.moe)}, top-{run.moe.moe_router_topk}, {run.moe.placement}."
            if run.moe
            else "; dense."
        ),
        f"Language model: {model['total'] / MEGA:,.1f} M parameters, {model['activated'] / MEGA:,.1f} M activated per token, "
        f"{model['token_flops'] / GIGA:,.3g} GFLOPs per token forward, attention's scores apart.",
        f"{found.tried:,} layouts tried, {len(found.plans)} valid and within {request.limit / GIB:.0f} GiB, "
        f"{len(found.too_big)} too big. Nothing here was measured on a GPU.",
        "",
        table(COLUMNS, [plan_row(plan) for plan in best]),
        "",
        "memory of the fullest rank, GiB",
        table(("layout", *asdict(best[0].memory)), [_memory_row(plan) for plan in best]),
        "",
        f"samples per step: {best[0].costs.samples_per_step:,.0f}"
        + (" (a packed row holds several)" if run.data.packing else "")
        + f"; the original's recipe: {data.global_batch_size}",
        "",
        "settings, best first:",
        *(f"  {settings_line(plan, given)}" for plan in best),
    ]
    return "\n".join(lines)


def _videos(request: Request) -> str:
    data = request.data
    frames = num_frames(data.video_seconds, request.run.data)
    return f", {data.videos:.2f} videos of {frames} frames" if data.videos else ""


def _width(moe: MoEConfig) -> str:
    return f" of width {moe.moe_ffn_hidden_size}" if moe.moe_ffn_hidden_size else ""


def language_model(request: Request) -> dict[str, int]:
    """Parameters of the language model, those that one token passes through, and what it computes there, forward."""
    model = Model(backbone=request.backbone, moe=request.run.moe)
    whole, activated = whole_parameters(model), activated_parameters(model)
    return {
        "total": sum(whole[role] for role in LANGUAGE_ROLES),
        "activated": sum(activated[role] for role in LANGUAGE_ROLES),
        "token_flops": token_flops(model),
    }


def _memory_row(plan: Plan) -> tuple[str, ...]:
    return (label(plan.layout), *(f"{value / GIB:.1f}" for value in asdict(plan.memory).values()))


def json_report(request: Request, best: Sequence[Plan], given: Sequence[str]) -> dict:
    """The same as plain data: bytes, seconds, shares."""
    return {
        "predicted": True,
        "backbone": request.backbone.name,
        "language_model": language_model(request),
        "stage": request.run.training.stage,
        "gpu": request.gpu.name,
        "gpus": request.world_size,
        "data": asdict(request.data),
        "plans": [
            {
                "layout": label(plan.layout),
                "settings": plan.settings,
                "command": settings_line(plan, given),
                "memory_bytes": asdict(plan.memory) | {"total": plan.memory.total},
                "step": time_parts(plan),
                "costs": asdict(plan.costs),
            }
            for plan in best
        ],
    }


def dry_run_report(plan: Plan, counts: list[dict[str, dict[str, float]]]) -> list[str]:
    """Counted beside predicted, a table for each pipeline rank; nothing without a dry run."""
    if not counts:
        return []
    head = (
        f"dry run of {label(plan.layout)}: the full-size model of each pipeline stage on fake tensors, balanced routing,\n"
        "one micro-batch, CPU modules (the GPU's keep other activations, and the tables above plan with those)"
    )
    return [head, *(f"pipeline rank {rank}\n{_comparison(rows)}" for rank, rows in enumerate(counts))]


def _comparison(rows: dict[str, dict[str, float]]) -> str:
    lines = []
    for name, row in rows.items():
        off = row["predicted"] / row["counted"] - 1 if row["counted"] else 0.0
        lines.append((name, f"{row['counted'] / MEGA:,.1f}", f"{row['predicted'] / MEGA:,.1f}", f"{off:+.2%}"))
    return table(("millions", "counted", "predicted", "off"), lines)
