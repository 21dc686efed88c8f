"""Talk with a checkpoint in the terminal.

  moellava chat                                            the quickstart's last stage
  moellava chat --load runs/stage3 --image photo.jpg       more pictures later with /image FILE
  moellava launch --nproc-per-node 2 chat --load runs/stage3 parallel.tensor_model_parallel_size=2

Commands in the conversation: /image FILE, /video FILE, /boxes, /clear, /save FILE, /help, /quit. Ctrl-C stops an answer.
"""

import argparse
import sys

from megatron_moellava.commands.program import (
    COUNT,
    QUICKSTART,
    add_layout_options,
    add_memory_options,
    add_reading_options,
    choose_machine,
    command_parser,
    number,
)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options of `moellava chat`."""
    parser = command_parser("chat", __doc__)
    parser.add_argument("--load", default=QUICKSTART, metavar="CKPT", help=f"checkpoint ({QUICKSTART})")
    parser.add_argument("--image", action="append", default=[], metavar="FILE", help="shown with the first question")
    add_reading_options(parser)
    parser.add_argument(
        "--temperature", type=number(float, least=0), default=0.0, help="0: the likeliest word each time (0)"
    )
    parser.add_argument(
        "--top-p",
        type=number(float, above=0, most=1),
        default=1.0,
        help="with a temperature: the likeliest words only (1.0)",
    )
    parser.add_argument("--num-beams", type=COUNT, default=1, help="beam search (1: off)")
    parser.add_argument("--max-new-tokens", type=COUNT, default=512, help="of one answer (512)")
    add_memory_options(parser)
    add_layout_options(parser)
    return parser.parse_intermixed_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Hold a conversation and return the exit code."""
    parsed = parse_arguments(arguments)
    choose_machine(parsed)
    from megatron_moellava.config import MoELlavaError

    try:
        from megatron_moellava.serving.command import chat

        chat(parsed)
    except MoELlavaError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    return 0
