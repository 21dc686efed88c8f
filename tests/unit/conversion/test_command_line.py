"""tools/convert.py as a person runs it."""

import json
import socket

import pytest

from megatron_moellava.commands.convert import main
from tests.helpers.conversion_models import TOWER, original_config, original_state, write_folder


@pytest.fixture
def convert(capsys):
    """Runs the tool in this process: (exit code, standard output, standard error)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return run


def test_a_release_is_imported_upcycled_inspected_compared_and_exported(tmp_path, convert):
    source = write_folder(tmp_path / "llama", original_state("llama", "dense"), original_config("llama", "dense"))
    code, out, error = convert("import", source, "--tower", TOWER, "--save", tmp_path / "dense")
    assert code == 0 and "wrote 78 tensors" in out, error
    seen = ("--modality", "depth", "--copy-tower", "--projector", "copy")
    code, out, error = convert("add-modality", tmp_path / "dense", *seen, "--save", tmp_path / "depth")
    assert (
        code == 0 and "pictures of depth: a tower of their own, " in out and "16 visual tokens each), copy proj" in out
    )
    assert "depth  " in convert("inspect", tmp_path / "depth")[1]
    assert convert("upcycle", tmp_path / "dense", "--placement", 1, 3, "--save", tmp_path / "moe")[0] == 0
    assert "layers 1, 3" in convert("inspect", tmp_path / "moe")[1]
    assert convert("diff", tmp_path / "dense", tmp_path / "moe")[0] == 1
    code, _, error = convert("export", tmp_path / "moe", "--layout", "transformers", "--save", tmp_path / "out")
    assert code == 0, error
    text = json.loads((tmp_path / "out/config.json").read_text())["text_config"]
    assert text["model_type"] == "qwen2_moe" and text["mlp_only_layers"] == [0, 2]


def test_a_dry_run_says_what_would_go_to_the_hub_and_asks_nobody(tmp_path, convert, monkeypatch):
    monkeypatch.setattr(socket, "socket", None)  # whoever opens a connection fails
    source = write_folder(tmp_path / "llama", original_state("llama", "dense"), original_config("llama", "dense"))
    assert convert("import", source, "--tower", TOWER, "--save", tmp_path / "dense")[0] == 0
    asked = ("export", tmp_path / "dense", "--layout", "transformers", "--save", tmp_path / "out")
    code, out, error = convert(*asked, "--push", "me/model", "--dry-run")
    assert code == 0, error
    names = {str(file.relative_to(tmp_path / "out")) for file in (tmp_path / "out").rglob("*") if file.is_file()}
    listed = [line.split() for line in out.partition(f"would upload {len(names)} files to me/model:\n")[2].splitlines()]
    assert {name: int(size.replace(",", "")) for size, name in listed} == {
        name: (tmp_path / "out" / name).stat().st_size for name in names
    }
    code, _, error = convert(
        "export", tmp_path / "dense", "--layout", "original", "--save", tmp_path / "b", "--dry-run"
    )
    assert code == 2 and "belong to --push" in error and not (tmp_path / "b").exists()


def test_errors_are_one_message_and_exit_code_2(tmp_path, convert):
    code, _, error = convert("inspect", tmp_path / "nothing")
    assert code == 2 and "does not exist" in error
