"""`moellava NAME ARGUMENTS`: find the command and run it; its exit code is the program's."""

import difflib
import importlib
import sys

from megatron_moellava import __version__
from megatron_moellava.commands.program import COMMANDS, how_called


def overview() -> str:
    """All commands, one a line."""
    program = how_called()
    lines = [f"  {name:<17} {command.help}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            f"usage: {program} COMMAND [ARGUMENTS]",
            "",
            "Three-stage MoE-tuning of vision-language models on Megatron-Core.",
            "",
            *lines,
            "",
            f"{program} COMMAND --help explains one command; {program} --version says which release this is.",
        ]
    )


def unknown(name: str) -> str:
    """The error for a name that is no command, with the nearest ones."""
    near = difflib.get_close_matches(name.replace("_", "-"), COMMANDS, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"commands are {', '.join(COMMANDS)}"
    return f"{how_called()}: error: {name!r} is no command; {hint}"


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Returns its exit code, or 2 when none or an unknown one is named."""
    words = sys.argv[1:] if arguments is None else arguments
    if not words:
        print(overview(), file=sys.stderr)
        return 2
    if words[0] in ("-h", "--help"):
        print(overview())
        return 0
    if words[0] == "--version":
        print(f"megatron-moellava {__version__}")
        return 0
    if words[0] not in COMMANDS:
        print(unknown(words[0]), file=sys.stderr)
        return 2
    module = importlib.import_module(f"megatron_moellava.commands.{COMMANDS[words[0]].module}")
    return module.main(words[1:])
