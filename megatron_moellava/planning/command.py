"""moellava plan: from a command line to a report, a picture, JSON, and a dry run."""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_moellava.backbones import get_backbone
from megatron_moellava.config import ConfigError, MoEConfig, load_config, read_yaml
from megatron_moellava.costs.gpus import GIB, get_gpu
from megatron_moellava.costs.layout import Layout
from megatron_moellava.costs.parameters import parameters_of
from megatron_moellava.costs.stage_work import recomputed_work, stage_work
from megatron_moellava.planning import report
from megatron_moellava.planning.activations import activations_of
from megatron_moellava.planning.memory import state_bytes
from megatron_moellava.planning.picture import draw, label
from megatron_moellava.planning.search import Found, Request, search
from megatron_moellava.planning.workload import STAGE_DATA, StageData
from megatron_moellava.towers import tower_of_run
from megatron_moellava.validation.modalities import way_problems
from megatron_moellava.validation.pictures import picture_problems
from megatron_moellava.validation.run import experts_of_backbone


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
    counts = dry_run(best[0].layout) if arguments.dry_run else []
    if arguments.yaml:
        Path(arguments.yaml).write_text(report.yaml_report(best[0], arguments.config, given))
    if arguments.json:
        data = report.json_report(request, best, given) | {"dry_run": counts}
        Path(arguments.json).write_text(json.dumps(data, indent=1) + "\n")
    return "\n\n".join([text, *report.dry_run_report(best[0], counts)])


def settings_of(arguments: argparse.Namespace) -> list[str]:
    """The command line as settings of the run: flags first, so that an override wins. Stage 3 has experts anyhow."""
    upcycles = arguments.stage == 3 and arguments.config is None and not experts_of(arguments)
    assumed = MoEConfig().num_moe_experts if upcycles else None
    flags = {
        "moe.num_moe_experts": arguments.num_experts or assumed,
        "data.seq_length": arguments.seq_length,
        "training.global_batch_size": arguments.global_batch_size,
    }
    return [f"{name}={value}" for name, value in flags.items() if value] + arguments.overrides


def experts_of(arguments: argparse.Namespace) -> list[str]:
    """The experts of a backbone that has some, as settings: `moellava train` takes them over by itself."""
    said = (read_yaml(arguments.config).get("moe") or {}) if arguments.config else {}
    own = experts_of_backbone({"backbone": arguments.backbone}).get("moe", {})
    return [f"moe.{name}={json.dumps(value)}" for name, value in own.items() if name not in said]


def request_of(arguments: argparse.Namespace, given: list[str]) -> Request:
    """The search that the command line asks for. ConfigError for bad settings, and for context parallelism.

    `given`: the settings that were typed, which the search keeps as they are.
    """
    data = STAGE_DATA[arguments.stage]
    if arguments.samples:
        data = replace(data, name="given", samples=arguments.samples)
    data = replace(data, **pictures_of(arguments, data))
    named = [
        f"model.backbone={arguments.backbone}",
        f"model.tower={arguments.tower}",
        f"training.stage={arguments.stage}",
        f"training.global_batch_size={data.global_batch_size}",
    ]
    named = [*(named if arguments.config is None else named[:3]), *experts_of(arguments)]
    run = load_config(arguments.config, [*named, *given])
    if run.parallel.context_parallel_size > 1:
        raise ConfigError(
            f"parallel.context_parallel_size={run.parallel.context_parallel_size} cannot be planned yet: its memory and its "
            "time are in no formula; use 1 here"
        )
    tower = tower_of_run(run)
    if problems := [*picture_problems(run, tower), *way_problems(run.data, tower)]:
        raise ConfigError("\n".join(problems))
    if arguments.tokens_per_sample:
        text = max(arguments.tokens_per_sample - data.shown(tower, run.data).tokens, 0.0)
        data = replace(data, text_tokens=text)
    fixed = frozenset(item.partition("=")[0] for item in given)
    return Request(
        run=run,
        backbone=get_backbone(run.model.backbone),
        tower=tower,
        gpu=get_gpu(arguments.gpu),
        world_size=arguments.gpus,
        data=data,
        fixed=fixed,
        imbalance=arguments.imbalance,
        memory_limit=arguments.memory_limit * GIB if arguments.memory_limit else None,
    )


def pictures_of(arguments: argparse.Namespace, data: StageData) -> dict[str, Any]:
    """What the command line says of pictures and videos, as fields of StageData. Videos take the place of pictures."""
    found: dict[str, Any] = {"image_size": arguments.image_size} if arguments.image_size else {}
    if arguments.images is not None:
        found["images"] = arguments.images
    if arguments.videos is not None:
        found |= {"videos": arguments.videos, "images": found.get("images", max(data.images - arguments.videos, 0.0))}
        found["video_seconds"] = arguments.video_seconds
    return found


def why_nothing(request: Request, found: Found) -> str:
    """Why no layout was found: the smallest and its memory, or what refused the first one."""
    if found.too_big:
        memory, smallest = found.too_big[0]
        return (
            f"no layout of {request.backbone.name} fits {request.world_size} {request.gpu.name}: the smallest "
            f"({label(smallest)}) needs {memory.total / GIB:.1f} GiB per rank, {request.limit / GIB:.1f} are there; "
            "use more GPUs, a shorter data.seq_length, or fewer experts"
        )
    return "no layout is valid; of the first one tried:\n" + "\n".join(found.refused)


def dry_run(layout: Layout) -> list[dict[str, dict[str, float]]]:
    """Build and run each pipeline stage on fake tensors: for each, what was counted and what the formulas say."""
    from megatron_moellava.planning.dry_run import count_rank  # megatron-core's training code

    rows = []
    for rank in range(layout.pp):
        counted, predicted = count_rank(layout, rank), predicted_counts(layout, rank)
        rows.append(
            {name: {"counted": getattr(counted, name), "predicted": value} for name, value in predicted.items()}
        )
    return rows


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
        "backward_flops": sum(item.backward for item in work)
        + sum(item.forward for item in recomputed_work(layout, rank, layout.tokens, length, layout.images)),
    }
