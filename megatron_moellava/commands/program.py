"""What the commands share: their names, how one was called, and the parser whose texts say it that way."""

import argparse
import re
import sys
from pathlib import Path
from typing import NamedTuple, get_args

from megatron_moellava.machine import Device, TransformerImpl, choose

PRECISION_HELP = "(auto: the checkpoint's own; fp32 for bf16 where the machine has no units for it)"
QUICKSTART = "runs/quickstart/stage3"  # the checkpoint that chat and serve take without --load


class Command(NamedTuple):
    """One line of the table."""

    module: str  # in megatron_moellava.commands
    tool: str  # file in tools/
    help: str


COMMANDS = {
    "convert": Command("convert", "convert.py", "import, upcycle, export, compare and inspect checkpoints"),
    "prepare-data": Command("prepare_data", "prepare_data.py", "write WebDataset shards, or describe a data set"),
    "plan": Command("plan", "plan.py", "layouts that fit, their memory, step time and GPU-hours, before the run"),
    "train": Command("train", "train.py", "train one of the three stages"),
    "launch": Command("launch", "launch.py", "torchrun whose signals and exit codes pass through"),
    "watch": Command("watch", "watch_routing.py", "watch the routers of a run while it trains"),
    "evaluate": Command("evaluate", "evaluate.py", "ask a checkpoint the paper's benchmarks and score the answers"),
    "analyze": Command("analyze", "analyze_routing.py", "where the tokens of a data set go in a MoE checkpoint"),
    "chat": Command("chat", "chat.py", "talk with a checkpoint in the terminal"),
    "serve": Command("serve", "serve.py", "a web page and an OpenAI-compatible API for a checkpoint"),
    "ablate": Command("ablate", "ablate.py", "run a grid of trainings over several seeds, and say what it shows"),
    "verify": Command("verify", "verify.py", "compare with recordings of the original MoE-LLaVA"),
}
# An override among other words of a command line: `--data a.json b.json optimizer.lr=1e-4`.
SETTING = re.compile(r"(model|moe|data|parallel|training|optimizer|checkpoint|logging)(\.\w+)+=")
MENTION = re.compile(rf"\bmoellava ({'|'.join(sorted(COMMANDS, key=len, reverse=True))})\b")


def how_called() -> str:
    """`moellava`, `python -m megatron_moellava`, or `python tools/` for a file of tools/."""
    program = Path(sys.argv[0])
    if program.parent.name == "tools" and program.name in {command.tool for command in COMMANDS.values()}:
        return "python tools/"
    module = program.name == "__main__.py" and program.parent.name == "megatron_moellava"
    return "python -m megatron_moellava" if module else "moellava"


def as_called(text: str) -> str:
    """`text`, which says `moellava train`, with the commands as this user types them (`python tools/train.py`)."""
    how = how_called()
    if how == "python tools/":
        return MENTION.sub(lambda found: how + COMMANDS[found[1]].tool, text)
    return MENTION.sub(rf"{how} \1", text)


class CommandParser(argparse.ArgumentParser):
    """Says the commands in its help as the user types them."""

    def format_help(self) -> str:
        return as_called(super().format_help())


def command_parser(name: str, description: str) -> argparse.ArgumentParser:
    """A parser for the command `name`; its texts name it as it was called, and `description` keeps its lines."""
    raw = argparse.RawDescriptionHelpFormatter
    return CommandParser(prog=as_called(f"moellava {name}"), description=description, formatter_class=raw)


def add_machine_options(parser: argparse.ArgumentParser, transformer_impl: str = "auto") -> None:
    """What a command runs on; `choose_machine` obeys."""
    parser.add_argument("--device", default="auto", choices=get_args(Device), help="(a GPU where there is one)")
    parser.add_argument(
        "--transformer-impl",
        default=transformer_impl,
        choices=get_args(TransformerImpl),
        help=f"modules on a GPU; auto: Transformer Engine's where it is installed ({transformer_impl})",
    )


def choose_machine(parsed: argparse.Namespace) -> None:
    """Obey --device and --transformer-impl, before anything imports torch."""
    choose(parsed.device, parsed.transformer_impl)


def add_memory_options(parser: argparse.ArgumentParser) -> None:
    """How much memory the keys and values of running requests may take."""
    parser.add_argument("--max-length", type=int, default=0, help="tokens of prompt and answer (the model's positions)")
    parser.add_argument(
        "--memory-limit", type=float, metavar="GIB", help="for keys and values on each GPU (most of what is free there)"
    )
