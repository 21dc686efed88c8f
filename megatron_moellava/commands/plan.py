"""Plan a run before it costs a GPU second: layouts that fit, their memory, step time, MFU and GPU-hours, as predictions.

  moellava plan --backbone phi-2 --stage 3 --gpus 64 --gpu h100
  moellava plan --backbone vicuna-7b-v1.5 --stage 2 --gpus 8 --gpu a100-80 --dry-run data.seq_length=4096

Layouts that moellava train would refuse are never suggested. A parallel.* or training.* setting given here stays as it
is. --dry-run builds the full-size model of every pipeline stage on fake tensors and counts what it holds and computes.
docs/measurements/planning.md says how far predictions are from published runs.
Exit codes: 0 planned; 2 nothing fits or is valid.
"""

import argparse
import sys
from typing import get_args

from megatron_moellava.commands.program import COUNT, command_parser, exit_code_of, number, while_somebody_reads
from megatron_moellava.config import Stage
from megatron_moellava.machine import choose


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options of `moellava plan`."""
    parser = command_parser("plan", __doc__)
    parser.add_argument("--backbone", required=True, help="a name such as phi-2, or a folder with a config.json")
    parser.add_argument("--stage", type=int, choices=get_args(Stage), required=True)
    parser.add_argument("--gpus", type=COUNT, required=True, metavar="N", help="in all")
    parser.add_argument("--gpu", default="h100", help="h100 (default), h200, b200, a100-80, a100-40, v100-32")
    parser.add_argument("--tower", default="clip-vit-large-patch14-336", help="(clip-vit-large-patch14-336)")
    parser.add_argument("--num-experts", type=COUNT, help="moe.num_moe_experts (stage 3: 4)")
    parser.add_argument("--seq-length", type=COUNT, help="data.seq_length (2048)")
    parser.add_argument("--global-batch-size", type=COUNT, help="rows per step (the recipe's: 256, 128, 128)")
    parser.add_argument("--samples", type=COUNT, help="rows of the data set (the published one of the stage)")
    parser.add_argument(
        "--tokens-per-sample", type=number(float, above=0), help="mean, images expanded (an estimate for the published)"
    )
    parser.add_argument(
        "--images", type=number(float, least=0), help="pictures per sample, mean (the published data's)"
    )
    parser.add_argument("--image-size", type=_size, metavar="WIDTHxHEIGHT", help="of a picture in pixels (640x480)")
    parser.add_argument(
        "--videos",
        type=number(float, least=0),
        help="videos per sample, mean, in place of pictures (none); data.video_* say how",
    )
    parser.add_argument(
        "--video-seconds", type=number(float, above=0), default=60.0, help="of a video, for data.video_fps (60)"
    )
    parser.add_argument(
        "--imbalance", type=number(float, least=1), default=1.25, help="busiest expert rank over the mean (1.25)"
    )
    parser.add_argument("--memory-limit", type=number(float, above=0), metavar="GiB", help="per GPU (what the GPU has)")
    parser.add_argument("--top", type=COUNT, default=5, metavar="N", help="plans shown (5)")
    parser.add_argument("--picture", default="plan.png", metavar="PNG", help="(plan.png)")
    parser.add_argument("--yaml", metavar="FILE", help="write the best plan as a config for moellava train --config")
    parser.add_argument("--json", metavar="FILE", help="write the plans as JSON too")
    parser.add_argument("--config", metavar="FILE.yaml", help="a run as moellava train takes it, e.g. a recipe")
    parser.add_argument("--dry-run", action="store_true", help="count the best plan on fake tensors")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    return parser.parse_intermixed_args(arguments)


def _size(text: str) -> tuple[int, int]:
    sides = text.split("x")
    if len(sides) != 2 or not all(side.isdigit() and int(side) for side in sides):
        raise argparse.ArgumentTypeError(f"{text} must be a width and a height in pixels, such as 640x480")
    return int(sides[0]), int(sides[1])


def main(arguments: list[str] | None = None) -> int:
    """Print a plan and return the exit code."""
    parsed = parse_arguments(arguments)
    if parsed.dry_run:
        choose("cpu")  # it counts the CPU's modules, whatever this machine has
    from megatron_moellava.config import MoELlavaError

    try:
        from megatron_moellava.planning.command import plan

        text = plan(parsed)
    except (MoELlavaError, OSError) as error:
        print(f"\n{type(error).__name__}: {error}", file=sys.stderr)
        return exit_code_of(error)
    return while_somebody_reads(lambda: print(text) or 0)
