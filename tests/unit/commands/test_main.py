"""`moellava`, `python -m megatron_moellava` and `python tools/...`: the same commands, at once, with their exit codes."""

import subprocess
import sys

import pytest

from megatron_moellava.commands.main import main
from megatron_moellava.commands.program import COMMANDS
from tests.helpers.paths import REPO

HEAVY = ("torch", "transformers", "megatron.core", "numpy")


def run(*words: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=REPO, timeout=120, **options)


def test_every_command_is_a_file_of_tools_and_nothing_else_is():
    assert sorted(command.tool for command in COMMANDS.values()) == sorted(
        path.name for path in REPO.glob("tools/*.py")
    )


def test_every_module_of_the_room_is_a_command():
    modules = {path.stem for path in REPO.glob("megatron_moellava/commands/*.py")} - {
        "__init__",
        "main",
        "program",
        "reference",
    }
    assert modules == {command.module for command in COMMANDS.values()}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_the_same_whoever_asks_and_imports_nothing_heavy(name):
    """Importing torch costs seconds; --help has to answer at once."""
    report = f"import atexit, sys; atexit.register(lambda: print([n for n in {HEAVY} if n in sys.modules]))"
    module = run(
        "-c", f"{report}; from megatron_moellava.commands.main import main; sys.exit(main([{name!r}, '--help']))"
    )
    tool = run(f"tools/{COMMANDS[name].tool}", "--help")
    assert (module.returncode, tool.returncode) == (0, 0), module.stderr + tool.stderr
    text, _, imported = module.stdout.rstrip().rpartition("\n")
    assert imported == "[]"
    assert f"moellava {name}" in text and f"python tools/{COMMANDS[name].tool}" in tool.stdout
    assert f"moellava {name}" not in tool.stdout and "tools/" not in text
    assert len(text.splitlines()) > 3, "a help text says more than this"


def test_the_overview_names_every_command_in_a_line_of_its_own(capsys):
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line.startswith("  ")] == list(COMMANDS)
    assert all(len(line) <= 120 for line in lines)


def test_no_command_is_a_mistake_that_shows_what_there_is(capsys):
    assert main([]) == 2
    assert "usage: moellava COMMAND" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "says"), [("trian", "train"), ("analyse", "analyze"), ("prepare_data", "prepare-data"), ("xyzzy", "serve")]
)
def test_an_unknown_command_gets_the_nearest_names(name, says, capsys):
    assert main([name]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"moellava: error: {name!r} is no command") and says in error


def test_exit_codes_are_the_commands_own(tmp_path, capsys):
    assert main(["evaluate", "--score-only", str(tmp_path / "nothing")]) == 2
    assert main(["convert", "inspect", str(tmp_path / "nothing")]) == 2
    assert "benchmark is empty" in capsys.readouterr().err
    assert run("-m", "megatron_moellava", "train", "--stage", "5").returncode == 2


@pytest.mark.parametrize("command", ["train", "launch"])
@pytest.mark.parametrize("start", ["module", "tool"])
def test_signals_have_their_handlers_before_anything_heavy_is_imported(command, start):
    """A scheduler's signal may come in the seconds that torch takes; the default would end the job without a word."""
    watch = """
import runpy, signal, sys
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "yaml", "megatron_moellava.config"):
            handled = all(callable(signal.getsignal(number)) for number in (signal.SIGTERM, signal.SIGUSR1))
            print("handled" if handled else "deaf", name, flush=True)
            raise SystemExit(7)
sys.meta_path.insert(0, Watch())
"""
    if start == "module":
        go = f"sys.argv = ['moellava', '{command}', 'x.py']; runpy.run_module('megatron_moellava', run_name='__main__')"
    else:
        go = f"sys.argv = ['tools/{command}.py', 'x.py']; runpy.run_path(sys.argv[0], run_name='__main__')"
    result = run("-c", watch + go)
    assert result.returncode == 7 and result.stdout.startswith("handled"), result.stdout + result.stderr


def test_launch_starts_a_command_and_hands_on_its_exit_code():
    """Plain torchrun would answer 1."""
    result = run("-m", "megatron_moellava", "launch", "--standalone", "--nproc-per-node=1", "train", "--stage", "5")
    assert result.returncode == 2, result.stderr
    assert "megatron_moellava train: error: argument --stage: invalid choice" in result.stderr


def test_the_package_brings_the_command_and_its_types():
    setup = (REPO / "setup.py").read_text()
    assert '"moellava = megatron_moellava.commands.main:main"' in setup
    assert (REPO / "megatron_moellava/py.typed").exists() and "py.typed" in setup
