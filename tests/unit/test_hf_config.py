"""Reading a Hugging Face folder's config.json."""

import json

import pytest

from megatron_moellava.config import ConfigError
from megatron_moellava.hf_config import INERT, MULTIMODAL, read_json


def test_a_folder_and_its_file_give_the_same(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert read_json(tmp_path) == read_json(tmp_path / "config.json") == {"model_type": "llama"}


def test_a_missing_file_and_one_that_is_not_json_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.json does not exist; give a folder"):
        read_json(tmp_path)
    for content in (b"{", b"\xff\xfe\x00"):
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(ConfigError, match=r"config\.json is not JSON"):
            read_json(tmp_path)


def test_keys_that_change_numbers_are_not_taken_for_inert():
    changing = {"hidden_size", "rope_theta", "rope_scaling", "hidden_act", "sliding_window", "tie_word_embeddings"}
    assert not changing & (INERT | MULTIMODAL)
    assert not INERT & MULTIMODAL
