"""Tokenizers as far as they are known without transformers; every mistake with one is in test_problems.py."""

import json

import pytest

from megatron_moellava.config import ConfigError
from megatron_moellava.data.tokenizer import load_tokenizer
from megatron_moellava.validation.tokenizer import read_tokenizer
from tests.helpers.made_tokenizer import CONTROL, write_tokenizer
from tests.helpers.paths import ASSETS


def test_every_kind_of_tokenizer_folder_is_read(tmp_path):
    write_tokenizer(tmp_path / "json")
    (tmp_path / "slow").mkdir()
    (tmp_path / "slow" / "vocab.json").write_text(json.dumps({"a": 0, "<|endoftext|>": 1}))
    (tmp_path / "slow" / "merges.txt").write_text("")
    (tmp_path / "slow" / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    for name, text in (("qwen.tiktoken", "YQ== 0\nYg== 1\n"), ("arcade100k.tiktoken", "YQ== 0\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text(text)
    sizes = {name: (found.vocab_size, found.token_id("<|endoftext|>")) for name, found in (
        (path.name, read_tokenizer(path)) for path in tmp_path.iterdir()
    )}  # fmt: skip
    assert sizes == {
        "json": (512, 512 - 11 + CONTROL.index("<|endoftext|>")),
        "slow": (3, 1),  # and the padding token that loading appends
        "qwen.tiktoken": (2 + 208, 2),
        "arcade100k.tiktoken": (100289, 100257),
    }
    spm = read_tokenizer(ASSETS / "tok_spm")
    assert spm.token_id("</s>") is not None


@pytest.mark.parametrize("name", ["tok_spm", "tok_bpe"])
def test_what_is_read_here_is_what_the_run_loads(name):
    quick, loaded = read_tokenizer(ASSETS / name), load_tokenizer(ASSETS / name)
    for token in (*CONTROL, "the", "a"):
        assert quick.token_id(token) == loaded.token_id(token) or token == "<unk>", token
    assert quick.vocab_size == loaded.vocab_size


NAMED = {
    "unknown in the vocabulary": (CONTROL, {"eos_token": "<s>"}),
    "unknown named": (("<s>", "<none>"), {"eos_token": "<s>", "unk_token": "<none>"}),
    "nothing for padding": (("<s>",), {"eos_token": "<s>"}),
    "a padding token of its own": (("<s>", "<|extra_0|>"), {"eos_token": "<s>"}),
    "a word of that name": (("<s>",), {"eos_token": "<s>", "unk_token": "word1"}),
    "named and not there": (("<s>",), {"eos_token": "</s>", "pad_token": "[PAD]"}),
    "the unknown token named and not there": (("<s>",), {"eos_token": "<s>", "unk_token": "<unk>"}),
}


@pytest.mark.parametrize("case", NAMED)
def test_tokens_that_loading_appends_are_counted(tmp_path, case):
    control, config = NAMED[case]
    folder = write_tokenizer(tmp_path, size=64, control=control)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    quick, loaded = read_tokenizer(folder), load_tokenizer(folder)
    assert quick.vocab_size == loaded.vocab_size
    assert [quick.token_id(token) for token in config.values()] == [loaded.token_id(token) for token in config.values()]


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "x.model").write_text("no model")
    with pytest.raises(ConfigError, match="SentencePiece model"):
        read_tokenizer(tmp_path / "x.model")
