"""Compare this program with recorded outputs of the original MoE-LLaVA, and say pass or FAIL for every quantity.

  moellava verify tests/golden/llama
  moellava launch --nproc-per-node 2 verify tests/golden parallel.expert_model_parallel_size=2

FOLDER holds one backbone's recordings (inputs.pt, dense/, dense.pt, moe/, moe.pt, ...), or folders that do; towers and
tokenizers are looked for in its assets/ or in the one beside it. Cases without a file are left out. Exit codes: 0
everything agrees; 1 something does not; 2 the folder or the layout cannot be used.
"""

import argparse
import sys
from pathlib import Path

from megatron_moellava.commands.program import add_machine_options, choose_machine, command_parser


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options of `moellava verify`."""
    parser = command_parser("verify", __doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="recordings of one backbone, or a folder of those")
    add_machine_options(parser, transformer_impl="local")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.field=value",
        help="the layout, e.g. parallel.tensor_model_parallel_size=2",
    )
    return parser.parse_intermixed_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Compare with the recordings; 0 when every quantity passes, 1 when one fails, else the error's exit code."""
    parsed = parse_arguments(arguments)
    choose_machine(parsed)
    from megatron_moellava.config import MoELlavaError
    from megatron_moellava.verify.command import verify

    try:
        return 0 if verify(parsed.folder, parsed.overrides) else 1
    except MoELlavaError as error:
        print(f"\n{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return error.exit_code
