"""Train one stage of MoE-tuning: 1 projector, 2 projector + language model, 3 MoE; or, after any, 4 preferences.

  moellava train --stage 1 --backbone phi-2 --data pretrain.json --image-folder images --load CKPT --save OUT
  moellava launch --nproc-per-node 8 train --stage 3 --config stage3.yaml parallel.expert_model_parallel_size=4

Every field of the run can be set in the YAML file of --config and by section.field=value, which wins. The same command
continues an interrupted run. Exit codes: 0 trained to the end; 2 the run as asked for cannot work; 3 too many steps
without a finite gradient; 4 no progress for parallel.distributed_timeout_minutes (stderr says which rank hangs where);
85 interrupted by SIGTERM or SIGUSR1: all finished steps are on disk; other codes are crashes.
"""

import argparse
import os
import signal
import sys
from typing import get_args

from megatron_moellava.commands.program import SETTING, command_parser
from megatron_moellava.exit_codes import INTERRUPTED
from megatron_moellava.machine import choose


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options of `moellava train`; settings that follow `--data FILE` count as overrides."""
    from megatron_moellava.config import Stage  # not before `main` has its handlers

    parser = command_parser("train", __doc__)
    parser.add_argument("--stage", type=int, choices=get_args(Stage), help="training.stage")
    parser.add_argument("--backbone", help="model.backbone: a name such as phi-2, or a folder with a config.json")
    parser.add_argument("--tower", help="model.tower: a name such as clip-vit-large-patch14-336, or a folder")
    parser.add_argument("--data", nargs="+", default=[], metavar="PATH", help="LLaVA JSON files or WebDataset folders")
    parser.add_argument(
        "--validation-data", nargs="+", default=[], metavar="PATH", help="held out: their loss while training"
    )
    parser.add_argument("--image-folder", default="", metavar="DIR", help="image paths of the rows are relative to it")
    parser.add_argument("--load", metavar="CKPT", help="checkpoint.load: where the stage starts from")
    parser.add_argument("--save", metavar="DIR", help="checkpoint.save: written to, and continued from when not empty")
    parser.add_argument("--config", metavar="FILE.yaml", help="the run as YAML; flags and overrides win over it")
    parser.add_argument(
        "--validate-only", action="store_true", help="check the run and the files, then exit with 0 or 2"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="e.g. optimizer.lr=1e-4")
    parsed = parser.parse_intermixed_args(arguments)
    for paths in (parsed.data, parsed.validation_data):  # `--data a.json b.json optimizer.lr=1e-4`
        parsed.overrides += [item for item in paths if SETTING.match(item)]
        paths[:] = [item for item in paths if not SETTING.match(item)]
    return parsed


def main(arguments: list[str] | None = None) -> int:
    """Train one stage, or only validate the run, and return the exit code."""
    # Until the training loop takes over there is nothing to save: be gone before the scheduler's patience is.
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda *_: os._exit(INTERRUPTED))
    parsed = parse_arguments(arguments)
    from megatron_moellava.config import MoELlavaError

    try:
        from megatron_moellava.validation.run import load_run, validate_run

        run = load_run(config=parsed.config, flags=flags(parsed), overrides=parsed.overrides)
        if parsed.validate_only:
            validate_run(run)
            print("the run is valid")
            return 0
        choose(run.training.device, run.training.transformer_impl)  # before torch looks for GPUs
        from megatron_moellava.training.run import train

        return train(run)
    except MoELlavaError as error:
        print(f"\n{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return error.exit_code


def flags(parsed: argparse.Namespace) -> dict[str, object]:
    """The flags as fields of the run."""
    return {
        "training.stage": parsed.stage,
        "model.backbone": parsed.backbone,
        "model.tower": parsed.tower,
        "checkpoint.load": parsed.load,
        "checkpoint.save": parsed.save,
        "data.sources": [{"path": path, "image_folder": parsed.image_folder} for path in parsed.data],
        "validation.sources": [{"path": path, "image_folder": parsed.image_folder} for path in parsed.validation_data],
    }
