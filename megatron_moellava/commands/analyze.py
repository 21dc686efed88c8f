"""Where the tokens of a data set go in a MoE checkpoint: pictures, numbers, and one HTML file with all of them.

moellava analyze --load runs/quickstart/stage3 --data runs/quickstart/data/test.jsonl \\
    --image-folder runs/quickstart/data/images --origin runs/quickstart/upcycled --out runs/quickstart/routing
moellava launch --nproc-per-node 4 analyze ... parallel.expert_model_parallel_size=4

--data takes LLaVA JSON or JSONL, or lines of {image, question, answer, type}. A collapsed layer or a dead expert is a
warning with advice. docs/how-to/routing.md explains the pictures.
"""

import argparse
import sys
from pathlib import Path

from megatron_moellava.commands.program import (
    SETTING,
    add_layout_options,
    add_reading_options,
    choose_machine,
    command_parser,
    exit_code_of,
    number,
)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options of `moellava analyze`."""
    parser = command_parser("analyze", __doc__)
    parser.add_argument("--load", required=True, metavar="CKPT", help="checkpoint of a MoE model")
    parser.add_argument("--data", required=True, nargs="+", metavar="FILE", help="the questions")
    parser.add_argument(
        "--image-folder", default="", metavar="DIR", help="images are relative to it (the file's folder)"
    )
    parser.add_argument(
        "--origin", default="", metavar="CKPT", help="what the experts were copied from: stage 2, or upcycled"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/routing"), help="folder to write (runs/routing)")
    parser.add_argument("--limit", type=number(int, least=0), default=500, help="samples looked at (500; 0: all)")
    parser.add_argument(
        "--overlays", type=number(int, least=0), default=6, help="pictures with the experts over them (6)"
    )
    parser.add_argument("--pca", action="store_true", help="also the original's picture of pathways")
    add_reading_options(parser)
    add_layout_options(parser)
    parsed = parser.parse_intermixed_args(arguments)
    settings = [item for item in parsed.data if SETTING.match(item)]
    parsed.data = [item for item in parsed.data if item not in settings]
    parsed.overrides += settings
    return parsed


def main(arguments: list[str] | None = None) -> int:
    """Analyse the routing of a checkpoint and return the exit code."""
    args = parse_arguments(arguments)
    choose_machine(args)
    from megatron_moellava.config import MoELlavaError

    try:
        from megatron_moellava.analysis.command import analyse

        text = analyse(args)
    except (MoELlavaError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return exit_code_of(error)
    if text:
        print(text)
    return 0
