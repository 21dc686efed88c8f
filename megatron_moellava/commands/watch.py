"""Watch the routers of a run while it trains: a bar for each expert and layer, text and image tokens side by side.

  moellava watch runs/stage3            follow the run (Ctrl-C ends)
  moellava watch runs/stage3 --once     the newest observation

Reads the routing.jsonl that training writes every `logging.routing_interval` steps. Yellow is an expert with less than a
quarter of the mean load, red one with more than twice the mean.
"""

import argparse
import sys
from pathlib import Path

from megatron_moellava.commands.program import command_parser, number


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options of `moellava watch`."""
    parser = command_parser("watch", __doc__)
    parser.add_argument(
        "run", type=Path, metavar="RUN_FOLDER", help="checkpoint.save (or logging.directory) of the run"
    )
    parser.add_argument("--once", action="store_true", help="draw the newest observation and exit")
    parser.add_argument(
        "--interval", type=number(float, above=0), default=1.0, help="seconds between looks at the file (1)"
    )
    parser.add_argument("--no-colour", action="store_true", help="plain text (the default when piped)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Draw observations until interrupted (once with `--once`) and return the exit code."""
    args = parse_arguments(arguments)
    from megatron_moellava.analysis.watch import watch
    from megatron_moellava.config import MoELlavaError

    colour = sys.stdout.isatty() and not args.no_colour
    try:
        watch(args.run, follow=not args.once, interval=args.interval, colour=colour)
    except MoELlavaError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print()
    return 0
