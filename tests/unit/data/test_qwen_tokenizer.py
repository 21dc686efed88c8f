"""Qwen (v1)'s tokenizer against tiktoken itself, which is what Qwen's own code calls."""

import base64
import unicodedata

import pytest
import tiktoken

from megatron_moellava.data.qwen_tokenizer import RANKS, SPECIALS, SPLIT
from megatron_moellava.data.tokenizer import load_tokenizer

WORDS = (
    b"th",
    b"the",
    b" t",
    b" the",
    b"un",
    b"unk",
    b"<u",
    b"<unk",
    b"<unk>",
    "\u00e9".encode(),
    b"\n\n",
    b"12",
    b"'s",
)
TEXTS = (
    "the unk <unk> isn't the cat's",
    "caf\u00e9 cafe\u0301 123 12\n\n  the\t",  # composed and decomposed: NFC makes them one
    "\u4f60\u597d, \U0001f600 <|im_start|>user",
    " ",
)


@pytest.fixture(scope="module")
def ranks() -> dict[bytes, int]:
    return {token: rank for rank, token in enumerate((*(bytes([i]) for i in range(256)), *WORDS))}


@pytest.fixture(scope="module")
def tokenizer(ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen")
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items())
    (folder / RANKS).write_text("".join(lines))
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def reference(ranks) -> tiktoken.Encoding:
    specials = {token: len(ranks) + number for number, token in enumerate(SPECIALS)}
    return tiktoken.Encoding("qwen", pat_str=SPLIT, mergeable_ranks=ranks, special_tokens=specials)


@pytest.mark.parametrize("text", TEXTS)
def test_text_has_the_ids_of_tiktoken(tokenizer, reference, text):
    normal = unicodedata.normalize("NFC", text)
    ids, starts = tokenizer.encode_text(text)
    assert ids == reference.encode(normal, disallowed_special=())
    assert tokenizer.decode(ids) == normal
    assert starts == sorted(starts) and starts[0] == 0 and starts[-1] < len(text)


def test_special_tokens_are_parsed_on_request_only(tokenizer, reference):
    text = "the<|endoftext|> the<|im_end|>"
    assert tokenizer.encode_parsed(text) == reference.encode(text, allowed_special="all")
    assert tokenizer.eos_id not in tokenizer.encode_text(text)[0]


def test_end_and_padding_are_the_originals(tokenizer, ranks):
    """`<unk>` is an ordinary word of this vocabulary, not the padding token."""
    assert tokenizer.eos_id == len(ranks)
    assert tokenizer.pad_id == len(ranks) + SPECIALS.index("<|extra_0|>")
    assert tokenizer.bos_id is None
    assert tokenizer.vocab_size == len(ranks) + len(SPECIALS)
