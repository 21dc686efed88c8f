"""The tokenizer's files, read as plain text and JSON: that they are there, that no code of theirs is needed, and that
they have the tokens which the template needs and the language model has room for.

`data/tokenizer.py` loads the tokenizer itself, with libraries that take seconds to import.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_moellava.backbones import Backbone
from megatron_moellava.config import ConfigError, MoELlavaError, RunConfig
from megatron_moellava.data.encode import check_template
from megatron_moellava.data.qwen_tokenizer import RANKS, SPECIALS
from megatron_moellava.data.templates import Template

ADVICE = "give the folder of the language model's tokenizer, or a SentencePiece .model file"


@dataclass(frozen=True, kw_only=True, slots=True)
class Vocabulary:
    """All tokens of a tokenizer with their ids."""

    ids: dict[str, int]

    def token_id(self, token: str) -> int | None:
        return self.ids.get(token)

    @property
    def size(self) -> int:
        """Ids are below this."""
        return max(self.ids.values(), default=-1) + 1


def tokenizer_problems(run: RunConfig, backbone: Backbone | None, template: Template | None) -> Iterator[str]:
    """Of `data.tokenizer`, together with the template and the backbone that it is used with."""
    name = run.data.tokenizer
    if not name:
        yield "data.tokenizer is empty; pass data.tokenizer=FOLDER with the backbone's tokenizer, or a SentencePiece .model"
        return
    if not Path(name).exists():
        yield f"data.tokenizer={name} does not exist; it is a tokenizer folder or a SentencePiece .model"
        return
    try:
        vocabulary = read_vocabulary(Path(name))
        if backbone is not None:
            check_size(name, vocabulary.size, backbone)
        if template is not None:
            check_template(template, vocabulary)
    except MoELlavaError as error:
        yield str(error)


def check_size(name: str, size: int, backbone: Backbone) -> None:
    """ConfigError when the model has no embedding for some token."""
    if size > backbone.vocab_size:
        raise ConfigError(
            f"data.tokenizer={name} has {size} tokens, more than the vocab_size={backbone.vocab_size} of "
            f"{backbone.name}; use the tokenizer of this backbone"
        )


def read_vocabulary(path: Path) -> Vocabulary:
    """The tokens of a folder or a SentencePiece file. ConfigError for what holds none, or none without its own code."""
    try:
        if path.is_file() and path.suffix == ".model":
            return Vocabulary(ids=_sentencepiece(path))
        if not path.is_dir():
            raise ConfigError(f"data.tokenizer={path} is neither a folder nor a SentencePiece .model file; {ADVICE}")
        for file, read in READERS.items():
            if (path / file).exists():
                return Vocabulary(ids=read(path / file) | _added(path))
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RuntimeError) as error:
        raise ConfigError(f"data.tokenizer={path} is damaged ({type(error).__name__}: {error}); {ADVICE}") from None
    held = ", ".join(sorted(item.name for item in path.iterdir())[:8]) or "nothing"
    needs_code = "auto_map" in _json(path / "tokenizer_config.json")
    why = "can only be read by running the code that comes with it" if needs_code else "holds no tokenizer"
    raise ConfigError(f"data.tokenizer={path} {why} (it holds {held}); {ADVICE} ({', '.join(READERS)})")


def _json(file: Path) -> dict:
    value = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if not isinstance(value, dict):
        raise ValueError(f"{file.name} is no JSON object")
    return value


def _tokenizer_json(file: Path) -> dict[str, int]:
    content = _json(file)
    vocab = content["model"]["vocab"]
    if isinstance(vocab, list):  # Unigram: pieces with their scores
        vocab = {piece: number for number, (piece, _) in enumerate(vocab)}
    return vocab | {token["content"]: token["id"] for token in content.get("added_tokens") or ()}


def _sentencepiece(file: Path) -> dict[str, int]:
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(file))
    return {model.id_to_piece(number): number for number in range(model.vocab_size())}


def _qwen_ranks(file: Path) -> dict[str, int]:
    """tiktoken's format, base64 of each token and its rank; special tokens follow."""
    with file.open() as lines:
        ranks = {token: int(rank) for token, rank in map(str.split, lines)}
    first = max(ranks.values()) + 1
    return ranks | {token: first + number for number, token in enumerate(SPECIALS)}


def _added(folder: Path) -> dict[str, int]:
    """Tokens that were added to the vocabulary, from the small files beside it."""
    decoder = _json(folder / "tokenizer_config.json").get("added_tokens_decoder") or {}
    return _json(folder / "added_tokens.json") | {token["content"]: int(number) for number, token in decoder.items()}


# The first of these files that a folder has is its vocabulary.
READERS = {
    "tokenizer.json": _tokenizer_json,
    "tokenizer.model": _sentencepiece,
    RANKS: _qwen_ranks,
    "vocab.json": _json,
}
