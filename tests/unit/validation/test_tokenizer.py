"""The tokenizer of a run, as far as it can be known without transformers."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from megatron_moellava.backbones import get_backbone
from megatron_moellava.config import ConfigError
from megatron_moellava.data.templates import get_template
from megatron_moellava.data.tokenizer import load_tokenizer
from megatron_moellava.validation.tokenizer import read_tokenizer, tokenizer_problems
from tests.helpers.inference_models import TOKENIZER, tiny_run
from tests.helpers.made_tokenizer import write_tokenizer
from tests.helpers.paths import ASSETS, REPO


def problems(name: str, template: str = "v1", backbone: str = "llama-tiny") -> list[str]:
    run = tiny_run()
    run = replace(run, data=replace(run.data, tokenizer=name))
    return list(tokenizer_problems(run, get_backbone(backbone), get_template(template)))


@pytest.mark.parametrize("folder", ["tok_spm", "tok_bpe"])
def test_it_counts_what_the_tokenizer_itself_counts(folder):
    quick, real = read_tokenizer(ASSETS / folder), load_tokenizer(ASSETS / folder)
    invented = folder == "tok_bpe"  # an unknown token, since its files name none
    assert quick.vocab_size == real.vocab_size - invented
    for token in ("<s>", "</s>", "<|endoftext|>", "<|im_end|>", "no token"):
        assert quick.token_id(token) == real.token_id(token), token


def test_a_good_tokenizer_has_no_problem():
    assert problems(str(TOKENIZER)) == []


def test_each_mistake_is_one_problem_with_the_way_out(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "code").mkdir()
    (tmp_path / "code/tokenizer_config.json").write_text(json.dumps({"auto_map": {}}))
    (tmp_path / "text.txt").touch()
    (tmp_path / "damaged.model").write_bytes(b"\x00\x01")
    big = write_tokenizer(tmp_path / "big", size=100_000)
    for name, message in {
        "": "data.tokenizer is empty",
        "/nowhere": "does not exist",
        str(tmp_path / "empty"): "holds no tokenizer (it holds nothing)",
        str(tmp_path / "code"): "can only be read by running the code that comes with it",
        str(tmp_path / "text.txt"): "neither a folder nor a SentencePiece .model",
        str(tmp_path / "damaged.model"): "data.tokenizer",
        str(big): "has 100000 tokens, more than the vocab_size=",
    }.items():
        found = problems(name)
        assert found and message in found[0], (name, found)


def test_a_template_of_another_tokenizer_is_a_problem():
    (problem,) = problems(str(TOKENIZER), "chatml")
    assert "data.template='chatml' writes <|im_start|>" in problem


def test_it_needs_neither_transformers_nor_torch():
    code = (
        f"import sys; from pathlib import Path; from megatron_moellava.validation.tokenizer import read_tokenizer; "
        f"read_tokenizer(Path({str(TOKENIZER)!r})); "
        f"sys.exit(str([name for name in ('torch', 'transformers') if name in sys.modules] or ''))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO)
    assert done.returncode in (0, 1) and done.stderr.strip() == "", done.stderr


def test_a_damaged_json_is_an_error_of_the_configuration(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match=r"tokenizer\.json is not valid JSON"):
        read_tokenizer(tmp_path)
