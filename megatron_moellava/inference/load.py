"""From a checkpoint folder to an engine: what is not said is what the checkpoint was trained with."""

import argparse
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_moellava import parallel
from megatron_moellava.backbones import get_backbone
from megatron_moellava.checkpoint.base import base_of
from megatron_moellava.checkpoint.description import read_description, trained_with
from megatron_moellava.checkpoint.folders import require_checkpoint
from megatron_moellava.checkpoint.verification import verify_checkpoint
from megatron_moellava.config import (
    CheckpointError,
    ConfigError,
    ParallelConfig,
    RunConfig,
    from_dict,
)
from megatron_moellava.data.templates import get_template
from megatron_moellava.data.tokenizer import load_tokenizer
from megatron_moellava.inference.engine import Engine
from megatron_moellava.inference.overrides import layout_with, parse_overrides, run_with
from megatron_moellava.inference.prompts import Prompter
from megatron_moellava.model.build import build_model
from megatron_moellava.model.lora import merge
from megatron_moellava.model.moe_llava import MoELlava
from megatron_moellava.model.precision import settled
from megatron_moellava.model.weights import load_with_base
from megatron_moellava.routers import ROUTERS
from megatron_moellava.towers.branches import completed

from megatron.core import parallel_state


def load_for_inference(
    checkpoint: str | Path,
    *,
    tokenizer: str = "",
    template: str = "",
    precision: str = "",
    layout: ParallelConfig | None = None,
    overrides: Sequence[str] = (),
    verify: bool = True,
    **engine_options,
) -> Engine:
    """An engine over the newest checkpoint of a folder. Joins the processes of torchrun unless that has been done.

    `overrides`: `section.field=value` of the command line, of the table in overrides.py.
    Empty strings mean what the checkpoint's run.json says (the backbone's own template, bf16, where it says nothing);
    a bf16 checkpoint answers in fp32 on a CPU without bf16 units unless `precision` is "bf16".
    `verify`: False does not compare the checkpoint's files with their digests. `engine_options` go to `Engine`.
    An adapter checkpoint is merged into its base, which must lie where it lay in training.
    Raises CheckpointError, or ConfigError for a missing tokenizer.
    """
    model, prompter = load_model(
        checkpoint,
        tokenizer=tokenizer,
        template=template,
        precision=precision,
        layout=layout,
        overrides=overrides,
        verify=verify,
    )
    return Engine(model, prompter, **engine_options)


def engine_of(args: argparse.Namespace, **engine_options) -> Engine:
    """`load_for_inference` by the options of a command (commands/program.py); `engine_options` go to `Engine`."""
    return load_for_inference(
        args.load,
        tokenizer=args.tokenizer,
        template=args.template,
        precision=args.precision,
        overrides=args.overrides,
        verify=not args.no_verify,
        max_sequence_length=args.max_length,
        memory_limit=args.memory_limit,
        **engine_options,
    )


def load_model(
    checkpoint: str | Path,
    *,
    tokenizer: str = "",
    template: str = "",
    precision: str = "",
    layout: ParallelConfig | None = None,
    overrides: Sequence[str] = (),
    rows: bool = False,
    verify: bool = True,
) -> tuple[MoELlava, Prompter]:
    """The model of `load_for_inference`, and what turns text and pictures into its input.

    `rows`: the caller makes rows of a data set, so that `overrides` may say how.
    """
    given = parse_overrides(overrides, rows=rows)
    folder = require_checkpoint(checkpoint)
    layout = inference_layout(layout_with(layout or ParallelConfig(), given))
    run = inference_run(folder, layout, tokenizer=tokenizer, template=template, precision=precision)
    run = run_with(run, given)
    if not parallel_state.model_parallel_is_initialized():
        parallel.initialize(layout, run.training.seed)
    run = _settled(run, folder)
    description = verify_checkpoint(folder, verify=verify, together=True)  # before minutes go into a large model
    base = base_of(folder, description)
    if base is not None:
        verify_checkpoint(base, verify=verify, together=True)
    prompter_parts = load_tokenizer(run.data.tokenizer), get_template(run.data.template)
    (model,) = build_model(run)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's distributed checkpoints, about its own future
        load_with_base(folder, [model], base, verified=True, base_verified=True)
    if model.adapters is not None:
        merge(model)
    model.unused_tower_tensors = {}  # they ride along for exports only
    prompter = Prompter(template=prompter_parts[1], tokenizer=prompter_parts[0], tower=model.tower, data=run.data)
    return model, prompter


def inference_layout(layout: ParallelConfig) -> ParallelConfig:
    """One token a step cannot be cut along the sequence, and a stage is one piece.

    Raises ConfigError for context parallelism.
    """
    if layout.context_parallel_size > 1:
        raise ConfigError("parallel.context_parallel_size must be 1 for generation")
    return replace(layout, sequence_parallel=False, virtual_pipeline_model_parallel_size=None)


def inference_run(folder: Path, layout: ParallelConfig, *, tokenizer: str, template: str, precision: str) -> RunConfig:
    """The run of a checkpoint, changed for generation."""
    description = read_description(folder)
    model, trained = description.model, trained_with(description)
    data = dict((description.config or {}).get("data") or {}) | trained.get("data", {})
    data |= {"packing": False, "sources": ()}
    if data.get("modalities"):
        records = [
            {name: item[name] for name in item if name not in ("tower", "projector")} for item in data["modalities"]
        ]
        data["modalities"] = completed(records, model, folder)
    # The names may be folders that are gone; the checkpoint itself says which model it holds.
    names = {"backbone": str(folder), "tower": str(folder)} if model.get("backbone_fields") else model
    tree = {
        "model": trained.get("model", {}) | {"backbone": names["backbone"], "tower": names["tower"]},
        "training": {"stage": description.stage or 2, "lora": description.adapter and description.adapter["lora"]},
        **{name: dict(model[name]) for name in ("moe", "tower_moe", "projector_moe") if model.get(name)},
        "data": data,
    }
    run = from_dict(RunConfig, tree)
    run = replace(
        run,
        parallel=layout,
        training=replace(run.training, precision=_precision(precision, trained)),
        data=replace(
            run.data,
            tokenizer=_tokenizer(folder, tokenizer or run.data.tokenizer),
            template=template or run.data.template or get_backbone(run.model.backbone).template,
        ),
    )
    if run.moe is not None and not ROUTERS[run.moe.router].evaluates_with_capacity:
        run = replace(
            run, moe=replace(run.moe, moe_expert_capacity_factor=None)
        )  # a request must not crowd out another
    return run


def _precision(asked: str, trained: dict[str, dict]) -> str:
    """What was asked for, else the checkpoint's own, where bf16 stands for the fastest on this machine."""
    if asked not in ("", "auto"):
        return asked
    own = trained.get("training", {}).get("precision", "bf16")
    return "auto" if own == "bf16" else own


def _settled(run: RunConfig, folder: Path) -> RunConfig:
    """The run with its precision by name. Where that is another than the checkpoint's own, one line says so."""
    found = settled(run)
    if found.reason and found.run.training.precision != "bf16":
        _note(f"precision {found.run.training.precision} for the bf16 checkpoint {folder}: {found.reason}")
    if found.warning:
        _note(found.warning)
    return found.run


def _note(text: str) -> None:
    if parallel.is_main_process():
        print(text, file=sys.stderr, flush=True)


def _tokenizer(folder: Path, name: str) -> str:
    if not name:
        raise CheckpointError(
            f"{folder} does not say which tokenizer belongs to it; pass --tokenizer FOLDER or FILE.model"
        )
    if not Path(name).expanduser().exists():
        raise CheckpointError(
            f"the tokenizer of {folder}, {name}, does not exist; pass --tokenizer FOLDER or FILE.model"
        )
    return name
