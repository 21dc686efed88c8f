"""What the commands share: their names, how one was called, and the parser whose texts say it that way."""

import argparse
import math
import os
import re
import sys
from collections.abc import Callable
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
    "doctor": Command("doctor", "doctor.py", "look at this machine: what it has, and whether runs work here"),
    "convert": Command("convert", "convert.py", "import, upcycle, export, compare and inspect checkpoints"),
    "prepare-data": Command("prepare_data", "prepare_data.py", "write WebDataset shards, or describe a data set"),
    "plan": Command("plan", "plan.py", "layouts that fit, their memory, step time and GPU-hours, before the run"),
    "train": Command("train", "train.py", "train one of the three stages, or on preferences after them"),
    "launch": Command("launch", "launch.py", "torchrun whose signals and exit codes pass through"),
    "watch": Command("watch", "watch_routing.py", "watch the routers of a run while it trains"),
    "evaluate": Command("evaluate", "evaluate.py", "ask a checkpoint the paper's benchmarks and score the answers"),
    "make-preferences": Command(
        "make_preferences", "make_preferences.py", "pairs of a checkpoint's own answers, ranked, for stage 4"
    ),
    "make-teacher": Command(
        "make_teacher", "make_teacher.py", "a checkpoint's likeliest tokens at every label, for a student"
    ),
    "analyze": Command("analyze", "analyze_routing.py", "where the tokens of a data set go in a MoE checkpoint"),
    "chat": Command("chat", "chat.py", "talk with a checkpoint in the terminal"),
    "serve": Command("serve", "serve.py", "a web page and an OpenAI-compatible API for a checkpoint"),
    "ablate": Command("ablate", "ablate.py", "run a grid of trainings over several seeds, and say what it shows"),
    "verify": Command("verify", "verify.py", "compare with recordings of the original MoE-LLaVA"),
}
# An override among other words of a command line: `--data a.json b.json optimizer.lr=1e-4`.
SETTING = re.compile(
    r"(model|moe|tower_moe|projector_moe|data|parallel|training|preference|optimizer|checkpoint|logging|validation|profile)"
    r"(\.\w+)+="
)
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
    """Says the commands in its help as the user types them, and reads `~` where no shell has: `--save=~/run`, quotes."""

    def format_help(self) -> str:
        return as_called(super().format_help())

    def parse_known_args(self, args=None, namespace=None):
        words = sys.argv[1:] if args is None else args
        return super().parse_known_args([_at_home(word) for word in words], namespace)


def _at_home(word: str) -> str:
    """`~/x`, and what stands behind the first `=` of `--save=~/x` or `checkpoint.save=~/x`, below the home folder."""
    name, equals, value = word.partition("=")
    return f"{name}={os.path.expanduser(value)}" if equals and not word.startswith("~") else os.path.expanduser(word)


def command_parser(name: str, description: str) -> argparse.ArgumentParser:
    """A parser for the command `name`; its texts name it as it was called, and `description` keeps its lines."""
    raw = argparse.RawDescriptionHelpFormatter
    return CommandParser(prog=as_called(f"moellava {name}"), description=description, formatter_class=raw)


def number(kind: type, *, least: float = -math.inf, above: float = -math.inf, most: float = math.inf) -> Callable:
    """For `type=` of an option: an int or a float within these limits; anything else is a usage error (exit code 2)."""

    def read(text: str) -> float:
        value = kind(text)
        rules = {
            "a finite number": math.isfinite(value),
            f"at least {least}": value >= least,
            f"greater than {above}": value > above,
            f"at most {most}": value <= most,
        }
        broken = [rule for rule, holds in rules.items() if not holds]
        if broken:
            raise argparse.ArgumentTypeError(f"{text} must be {broken[0]}")
        return value

    read.__name__ = kind.__name__  # argparse says "invalid int value"
    return read


COUNT = number(int, least=1)


def while_somebody_reads(run: Callable[[], int]) -> int:
    """What `run` returns; 0 where its reader has gone (`moellava convert inspect RUN | head`), without a traceback."""
    try:
        code = run()
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would complain when it ends
        return 0


def exit_code_of(error: Exception) -> int:
    """Of an error that is the user's, or the file system's, whose message names the file."""
    return getattr(error, "exit_code", 2)


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
    parser.add_argument(
        "--max-length", type=number(int, least=0), default=0, help="tokens of prompt and answer (the model's positions)"
    )
    parser.add_argument(
        "--memory-limit",
        type=number(float, above=0),
        metavar="GIB",
        help="for keys and values on each GPU (most of what is free there)",
    )


def add_reading_options(parser: argparse.ArgumentParser) -> None:
    """How a checkpoint that answers is read."""
    from megatron_moellava.config import Precision  # not before `train` and `launch` have their handlers of signals

    parser.add_argument("--tokenizer", default="", help="tokenizer folder or .model file (the checkpoint's own)")
    parser.add_argument("--template", default="", help="conversation version (the checkpoint's own)")
    parser.add_argument("--precision", default="auto", choices=get_args(Precision), help=PRECISION_HELP)


def add_layout_options(parser: argparse.ArgumentParser) -> None:
    """Where a checkpoint that answers is put: the last options of a command, with its settings."""
    parser.add_argument("--no-verify", action="store_true", help="do not compare the checkpoint with its digests")
    add_machine_options(parser)
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.field=value",
        help="parallel.*: the layout under torchrun; and moe.second_choice=deterministic and the like",
    )


def add_judge_options(parser: argparse.ArgumentParser, judges: str) -> None:
    """The model that grades answers; `judges` says whose."""
    parser.add_argument(
        "--judge-url", default="", help="base of an OpenAI-compatible server, as http://localhost:8000/v1"
    )
    parser.add_argument("--judge-model", default="", help=judges)
    parser.add_argument(
        "--judge-key-variable", default="OPENAI_API_KEY", help="environment variable with the judge's key"
    )
