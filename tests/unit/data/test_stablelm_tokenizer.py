"""StableLM-2's Arcade100k tokenizer against tiktoken itself, which is what its own code calls."""

import base64
import json
import unicodedata

import pytest
import tiktoken

from megatron_moellava.data.encode import check_template
from megatron_moellava.data.stablelm_tokenizer import RANKS, SPECIALS
from megatron_moellava.data.templates import get_template
from megatron_moellava.data.tokenizer import load_tokenizer

# As published: cl100k's pattern with digits alone.
PATTERN = r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
WORDS = (
    b"th",
    b"the",
    b" t",
    b" the",
    b"ca",
    b"cat",
    b" c",
    b" cat",
    "\u00e9".encode(),
    b"\n\n",
    b"12",
    b"'s",
    b"</s>",
    b"</",
)
TEXTS = (
    "the cat's 12345 CAT'S",
    "caf\u00e9 cafe\u0301 123 12\n\n  the\t",
    "\u4f60\u597d, \U0001f600 <|im_start|>user\r\n\r\nthe",
    "   the   cat   ",
)


@pytest.fixture(scope="module")
def ranks() -> dict[bytes, int]:
    return {token: rank for rank, token in enumerate((*(bytes([i]) for i in range(256)), *WORDS))}


@pytest.fixture(scope="module")
def folder(ranks, tmp_path_factory):
    """As the hub has it: the ranks, a class that is its own code, and that code, which must not run."""
    folder = tmp_path_factory.mktemp("stablelm")
    (folder / RANKS).write_text(
        "".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items())
    )
    names = {
        "tokenizer_class": "Arcade100kTokenizer",
        "auto_map": {"AutoTokenizer": ["code.Arcade100kTokenizer", None]},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    (folder / "code.py").write_text("raise SystemExit('the code of a folder was run')")
    return folder


@pytest.fixture(scope="module")
def reference(ranks) -> tiktoken.Encoding:
    return tiktoken.Encoding("arcade", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=SPECIALS)


def test_special_tokens_have_their_published_ids(folder):
    tokenizer = load_tokenizer(folder)
    named = {"<|endoftext|>": 100257, "<|fim_pad|>": 100261, "<reponame>": 100275, "<|endofprompt|>": 100276}
    named |= {"<|im_start|>": 100277, "<|pause|>": 100279, "<|reg0|>": 100280, "<|extra0|>": 100288}
    assert {token: tokenizer.token_id(token) for token in named} == named
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.bos_id, tokenizer.vocab_size) == (
        100257,
        100280,
        None,
        100289,
    )


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", ["ranks", "tokenizer.json"])
def test_text_has_the_ids_of_tiktoken(folder, reference, text, kind, tmp_path):
    tokenizer = load_tokenizer(folder)
    if kind == "tokenizer.json":  # as converted folders have it: the class says GPT-2, the file another split pattern
        tokenizer.model.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
        config = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        tokenizer = load_tokenizer(tmp_path)
    normal = unicodedata.normalize("NFC", text)
    ids, starts = tokenizer.encode_text(text)
    assert ids == reference.encode(normal, disallowed_special=())
    assert tokenizer.encode_parsed(text) == reference.encode(normal, allowed_special="all")
    assert tokenizer.decode(ids) == normal
    assert starts == sorted(starts) and starts[-1] < len(text)


def test_its_template_fits_and_a_word_is_no_end_of_an_answer(folder):
    """`</s>` is a word of this vocabulary: the Llama templates would train a word where they mean a control token."""
    tokenizer = load_tokenizer(folder)
    check_template(get_template("stablelm"), tokenizer)
    assert tokenizer.token_id("</s>") is None
