"""docs/reference/commands.md from the commands' own --help: python -m megatron_moellava.commands.reference > FILE"""

import contextlib
import importlib
import io
import os
import sys

from megatron_moellava.commands.main import overview
from megatron_moellava.commands.program import COMMANDS

HEAD = """# Commands

What `--help` says, made by `python -m megatron_moellava.commands.reference`; a test compares. `pip install` gives the command
`moellava`; `python -m megatron_moellava` and, in a clone, the files of `tools/` are the same. Settings of the form
`section.field=value` are explained in [configuration](configuration.md).
"""


def help_of(name: str, *words: str) -> str:
    """The help text of a command, or of one of its own commands."""
    module = importlib.import_module(f"megatron_moellava.commands.{COMMANDS[name].module}")
    with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
        module.main([*words, "--help"])
    return text.getvalue().strip()


def page() -> str:
    """The whole document, as wide as COLUMNS says and with the program called as sys.argv says."""
    from megatron_moellava.commands import convert

    parts = [HEAD, block(overview())]
    for name in COMMANDS:
        parts += [f"## moellava {name}\n", block(help_of(name))]
        if name == "convert":
            for word in convert.COMMANDS:
                parts += [f"### moellava convert {word}\n", block(help_of(name, word))]
    return "\n".join(parts)


def block(text: str) -> str:
    """A fenced block of Markdown."""
    return f"```text\n{text}\n```\n"


if __name__ == "__main__":
    os.environ["COLUMNS"] = "100"  # whatever the terminal
    sys.argv = ["moellava"]
    print(page(), end="")
