"""Serve a checkpoint: a web page, and OpenAI's /v1/chat/completions.

  moellava serve                                           the quickstart's last stage on http://127.0.0.1:8000
  moellava serve --load runs/stage3 --port 9000 --examples pictures/
  moellava launch --nproc-per-node 2 serve --load runs/stage3 parallel.expert_model_parallel_size=2

Only this machine can connect unless --host says otherwise; then set a token: MOELLAVA_TOKEN=... moellava serve
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
    """The options of `moellava serve`."""
    parser = command_parser("serve", __doc__)
    parser.add_argument("--load", default=QUICKSTART, metavar="CKPT", help=f"checkpoint ({QUICKSTART})")
    add_reading_options(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    parser.add_argument("--port", type=number(int, least=0, most=65535), default=8000, help="(8000)")
    parser.add_argument("--allow-host", action="append", default=[], help="accept this Host header too ('*': any)")
    parser.add_argument("--model-name", default="", help="name in the API (the checkpoint's folder)")
    parser.add_argument("--token-variable", default="MOELLAVA_TOKEN", help="environment variable with a bearer token")
    parser.add_argument("--examples", default="", metavar="DIR", help="pictures that the page offers")
    parser.add_argument("--batch-size", type=COUNT, default=16, help="answers at the same time (16)")
    parser.add_argument("--max-open-requests", type=COUNT, default=64, help="running and waiting; more get 429 (64)")
    parser.add_argument("--max-new-tokens", type=COUNT, default=1024, help="of one answer (1024)")
    parser.add_argument("--max-body-mb", type=number(float, above=0), default=30.0, help="of one request (30)")
    parser.add_argument("--request-seconds", type=number(float, above=0), default=300.0, help="of one answer (300)")
    parser.add_argument("--allow-remote-images", action="store_true", help="fetch http(s) image URLs of public hosts")
    add_memory_options(parser)
    parser.add_argument(
        "--prefix-cache",
        type=number(float, least=0),
        default=1.0,
        metavar="GIB",
        help="beside it, for conversations whose next turn then reads only what is new; 0: none (1)",
    )
    add_layout_options(parser)
    return parser.parse_intermixed_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Serve until stopped and return the exit code."""
    parsed = parse_arguments(arguments)
    choose_machine(parsed)
    from megatron_moellava.config import MoELlavaError

    try:
        from megatron_moellava.serving.command import serve

        serve(parsed)
    except MoELlavaError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    return 0
