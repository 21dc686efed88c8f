"""tools/convert.py as a person runs it."""

import json

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


def test_errors_are_one_message_and_exit_code_2(tmp_path, convert):
    code, _, error = convert("inspect", tmp_path / "nothing")
    assert code == 2 and "does not exist" in error
