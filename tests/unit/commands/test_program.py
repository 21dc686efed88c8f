"""Texts name the commands as the user types them."""

import sys

import pytest

from megatron_moellava.commands.program import as_called, command_parser


@pytest.mark.parametrize(
    ("program", "says"),
    [
        ("/usr/bin/moellava", "moellava train"),
        ("tools/train.py", "python tools/train.py"),
        ("/somewhere/megatron_moellava/__main__.py", "python -m megatron_moellava train"),
        ("examples/quickstart/run.py", "moellava train"),
        ("elsewhere/train.py", "moellava train"),
    ],
)
def test_usage_errors_and_descriptions_follow_the_call(program, says, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [program])
    parser = command_parser("train", "One line.\n\n  moellava train --stage 1\n")
    parser.add_argument("--yaml", help="for moellava train --config")
    text = parser.format_help()
    assert text.startswith(f"usage: {says} ") and f"  {says} --stage 1" in text and f"for {says} --config" in text
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(["--unknown"])
    assert stop.value.code == 2 and f"{says}: error:" in capsys.readouterr().err


def test_the_longest_command_name_wins_and_other_words_stay(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tools/plan.py"])
    assert as_called("moellava prepare-data") == "python tools/prepare_data.py"
    assert as_called("moellava plans; megatron_moellava train") == "moellava plans; megatron_moellava train"
