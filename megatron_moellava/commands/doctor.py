"""One page about this machine: versions, GPUs, modules, precision, memory, locks, disk, and what each means for a run.

  moellava doctor                          look here, in a few seconds
  moellava doctor --folder /scratch/runs   and at the folder that runs will write to
  moellava doctor --json                   the same for a program

Nothing is changed; one product and one reduction are computed, and one small file is written and removed. Run it where the
training will run: on a node of the cluster, in the container. Exit codes: 0 runs work here; 2 something keeps them from it.
"""

import argparse
import json
from pathlib import Path

from megatron_moellava.commands.program import add_machine_options, choose_machine, command_parser, while_somebody_reads


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options of `moellava doctor`."""
    parser = command_parser("doctor", __doc__)
    parser.add_argument(
        "--folder", type=Path, default=Path(), metavar="DIR", help="where runs will write to (the current folder)"
    )
    parser.add_argument("--json", action="store_true", help="for a program: {works, findings}")
    add_machine_options(parser)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Print the page and return the exit code."""
    parsed = parse_arguments(arguments)
    choose_machine(parsed)
    from megatron_moellava.doctor import devices, host, software
    from megatron_moellava.doctor.findings import as_data, page, works

    findings = [
        *host.machine(),
        *host.folder(parsed.folder),
        *software.versions(),
        *software.optional(),
        *devices.compute(),
        *devices.environment(),
    ]

    def show() -> int:
        print(json.dumps(as_data(findings), indent=1) if parsed.json else page(findings))
        return 0 if works(findings) else 2

    return while_somebody_reads(show)
