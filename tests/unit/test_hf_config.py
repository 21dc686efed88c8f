"""Reading a Hugging Face folder's config.json."""

import json
from dataclasses import dataclass

import pytest

from megatron_moellava.config import ConfigError
from megatron_moellava.hf_config import INERT, MULTIMODAL, read_json, wrong_numbers


def test_a_folder_and_its_file_give_the_same(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert read_json(tmp_path) == read_json(tmp_path / "config.json") == {"model_type": "llama"}


def test_a_missing_file_and_one_that_is_not_json_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.json does not exist; give a folder"):
        read_json(tmp_path)
    for content in (b"", b"{", b"\xff\xfe\x00"):
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(ConfigError, match=r"config\.json is not JSON"):
            read_json(tmp_path)
    for content in (b"[]", b"null", b"7"):
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(ConfigError, match=r"config\.json is not a JSON object"):
            read_json(tmp_path)


@dataclass
class Sizes:
    layers: int
    epsilon: float
    name: str = ""


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"layers": 2, "epsilon": 1e-5, "name": "x"}, None),
        ({"layers": 2, "epsilon": 1}, None),
        ({"layers": "2"}, "num_layers='2': must be a whole number above 0"),
        ({"layers": 0}, "num_layers=0"),
        ({"layers": True}, "num_layers=True"),
        ({"layers": 2.5}, "num_layers=2.5"),
        ({"epsilon": "1e-5"}, "epsilon='1e-5': must be a number"),
        ({"epsilon": float("nan")}, "epsilon=nan"),
    ],
)
def test_what_is_no_number_is_named_by_the_configs_key(values, problem):
    found = wrong_numbers(Sizes, values, {"num_layers": "layers"})
    assert found == [] if problem is None else problem in found[0]


def test_keys_that_change_numbers_are_not_taken_for_inert():
    changing = {"hidden_size", "rope_theta", "rope_scaling", "hidden_act", "sliding_window", "tie_word_embeddings"}
    assert not changing & (INERT | MULTIMODAL)
    assert not INERT & MULTIMODAL
