"""Texts name the commands as the user types them."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from megatron_moellava.commands.main import main
from megatron_moellava.commands.program import SETTING, as_called, command_parser
from megatron_moellava.config import RunConfig


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


@pytest.mark.parametrize(
    ("word", "read"),
    [
        ("~/run", "/home/user/run"),
        ("--save=~/run", "/home/user/run"),
        ("checkpoint.save=~/a=b", "checkpoint.save=/home/user/a=b"),
        ("a~/b", "a~/b"),
        ("optimizer.lr=1e-3", "optimizer.lr=1e-3"),
    ],
)
def test_the_home_folder_is_found_where_no_shell_has_put_it(word, read, monkeypatch):
    monkeypatch.setenv("HOME", "/home/user")
    parser = command_parser("train", "")
    parser.add_argument("--save")
    parser.add_argument("words", nargs="*")
    parsed = parser.parse_intermixed_args([word])
    assert [parsed.save, *parsed.words] == ([read] if word.startswith("--") else [None, read])


def test_a_reader_that_leaves_is_no_error(tmp_path):
    """`moellava convert inspect FOLDER | head -1`: more than a pipe holds, and nobody reads it."""
    save_file({f"x{'y' * 200}{i}": torch.zeros(i + 1) for i in range(1000)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({}))
    command = [sys.executable, "-m", "megatron_moellava", "convert", "inspect", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    said = process.stderr.read()
    assert (process.wait(), said) == (0, "")


def test_the_longest_command_name_wins_and_other_words_stay(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tools/plan.py"])
    assert as_called("moellava prepare-data") == "python tools/prepare_data.py"
    assert as_called("moellava plans; megatron_moellava train") == "moellava plans; megatron_moellava train"


RUN = {  # options that a command needs before it reads another one
    "prepare-data": ["--data", "x.json", "--out", "out"],
    "plan": ["--backbone", "phi-2", "--stage", "2", "--gpus", "8"],
    "upcycle": ["from", "--save", "to"],
    "analyze": ["--load", "c", "--data", "x.json"],
    "watch": ["run"],
}
NUMBERS = [
    *((("prepare-data",), option, "0", "at least 1") for option in (
        "--workers", "--rows-per-shard", "--max-images", "--video-frames", "--seq-length", "--max-sample-length",
        "--packing-buffer",
    )),
    *((("prepare-data",), "--max-skip-share", value, "") for value in ("-0.1", "1.1", "nan")),
    *((("plan",), option, "-1", "") for option in (
        "--gpus", "--num-experts", "--seq-length", "--global-batch-size", "--samples", "--tokens-per-sample",
        "--imbalance", "--memory-limit", "--top",
    )),
    (("plan",), "--imbalance", "0.5", "at least 1"),
    *((("convert", "upcycle"), option, "0", "at least 1") for option in ("--num-experts", "--topk")),
    *((("convert", "upcycle"), "--noise", value, "") for value in ("-1", "nan", "inf")),
    *((("convert", "upcycle"), "--router-scale", value, "") for value in ("-1", "nan", "inf")),
    *((("chat",), option, value, "") for option, value in (
        ("--temperature", "-1"), ("--temperature", "nan"), ("--top-p", "0"), ("--top-p", "1.5"), ("--num-beams", "0"),
        ("--max-new-tokens", "0"), ("--max-length", "-1"), ("--memory-limit", "0"),
    )),
    *((("serve",), option, value, "") for option, value in (
        ("--port", "-1"), ("--port", "99999"), ("--batch-size", "0"), ("--max-open-requests", "0"),
        ("--max-new-tokens", "-5"), ("--max-body-mb", "0"), ("--request-seconds", "-1"), ("--memory-limit", "inf"),
    )),
    *((("evaluate",), option, value, "") for option, value in (("--batch-size", "0"), ("--temperature", "-0.5"))),
    *((("analyze",), option, "-1", "at least 0") for option in ("--limit", "--overlays")),
    (("watch",), "--interval", "0", "greater than 0"),
]  # fmt: skip


@pytest.mark.parametrize(("command", "option", "value", "rule"), NUMBERS)
def test_a_number_that_means_nothing_is_a_usage_error(command, option, value, rule, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*command, *RUN.get(command[-1], []), f"{option}={value}"])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and f"argument {option}: {value} must be {rule}" in said


def test_a_path_that_cannot_be_written_is_one_line(tmp_path, capsys):
    rows = tmp_path / "rows.json"
    rows.write_text('[{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}]')
    assert main(["prepare-data", "--data", str(rows), "--out", str(rows)]) == 2
    assert f"FileExistsError: [Errno 17] File exists: '{rows}'" in capsys.readouterr().err


def test_settings_of_every_section_are_no_files():
    """`train --validation-data held.json validation.interval=5`: what follows the file is a setting."""
    for section in dataclasses.fields(RunConfig):
        assert SETTING.match(f"{section.name}.field=1"), section.name
    assert not SETTING.match("validation.json")
