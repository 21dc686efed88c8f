"""The small files of an export."""

import json

import pytest

from megatron_moellava.config import ConfigError
from megatron_moellava.conversion.export_files import as_folder, tokenizer_files, write_files
from tests.helpers.paths import ASSETS

FILE = ASSETS / "tok_spm/tokenizer.model"


def test_a_sentencepiece_file_alone_is_a_folder_for_as_long_as_it_is_needed():
    with as_folder(FILE) as folder:
        assert (folder / "tokenizer.model").read_bytes() == FILE.read_bytes()
        assert json.loads((folder / "tokenizer_config.json").read_text())["add_bos_token"]
    assert not folder.exists() and FILE.exists()
    with as_folder(FILE.parent) as folder:
        assert folder == FILE.parent


def test_a_tokenizers_files_are_those_that_the_export_has_not(tmp_path):
    for name in ("tokenizer.json", "vocab.json", "tokenization_own.py", "model.safetensors", "config.json"):
        (tmp_path / name).write_text(name)
    found = tokenizer_files(tmp_path, {"tokenizer.json": {}})
    assert found == {name: tmp_path / name for name in ("vocab.json", "tokenization_own.py")}
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no tokenizer files; give the folder of the language model"):
        tokenizer_files(tmp_path / "empty", {})


def test_files_are_written_as_json_text_or_a_copy(tmp_path):
    write_files(tmp_path, {"a.json": {"x": 1}, "b.md": "# é", "c.model": FILE})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}
    assert (tmp_path / "b.md").read_text(encoding="utf-8") == "# é"
    assert (tmp_path / "c.model").read_bytes() == FILE.read_bytes()
