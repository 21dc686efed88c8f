"""What the small files beside a vocabulary say: the class, the names of special tokens, the tokens that were added.

tokenizer_config.json, special_tokens_map.json and added_tokens.json, read as transformers 4.37 reads them for a slow
tokenizer: `added_tokens_decoder` says everything where it exists (4.34 and later); otherwise the two other files do.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from megatron_moellava.config import ConfigError

NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")
# In tokenizer_config.json of an export: what the small files said of the tokenizer that was trained with.
AS_TRAINED = "trained_tokenizer"


@dataclass(frozen=True, kw_only=True, slots=True)
class AddedToken:
    """A token that is cut out of a text before the vocabulary sees it."""

    content: str
    id: int | None = None  # None: whatever the vocabulary says, or the next free one
    special: bool = False  # a control token: text of a conversation never is one
    lstrip: bool = False  # blanks before it go
    rstrip: bool = False  # blanks after it go
    normalized: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerFiles:
    """The files' content in one form, whichever version of transformers wrote them."""

    config: dict = field(default_factory=dict)  # tokenizer_config.json
    named: dict[str, str] = field(default_factory=dict)  # "eos_token" -> "</s>", for those of NAMES that are given
    additional: tuple[str, ...] = ()  # additional_special_tokens
    added: tuple[AddedToken, ...] = ()  # by id

    @property
    def tokenizer_class(self) -> str:
        """The class that tokenizer_config.json names; "" where it names none."""
        return str(self.config.get("tokenizer_class") or "")

    @property
    def specials(self) -> set[str]:
        """transformers' all_special_tokens."""
        return {*self.named.values(), *self.additional}


def read_files(folder: Path) -> TokenizerFiles:
    """Everything of a folder but the vocabulary; missing files say nothing."""
    config = read_object(folder / "tokenizer_config.json")
    config = config | config.get(AS_TRAINED, {})
    special_map = read_object(folder / "special_tokens_map.json")
    decoder = config.get("added_tokens_decoder")
    merged = config if decoder is not None else config | special_map
    names = {name: merged.get(name, special_map.get(name)) for name in NAMES}
    named = {name: _content(value) for name, value in names.items() if value}
    extra = merged.get("additional_special_tokens") or merged.get("extra_special_tokens") or ()
    additional = tuple(map(_content, extra.values() if isinstance(extra, dict) else extra))
    if decoder is not None:
        added = [_added(value, int(index)) for index, value in decoder.items()]
    else:
        special = {*named.values(), *additional}
        listed = read_object(folder / "added_tokens.json").items()
        added = [AddedToken(content=text, id=int(index), special=text in special) for text, index in listed]
        added = _with_flags(added, [*(merged.get(name) for name in NAMES), *extra])
    ordered = sorted(added, key=lambda token: token.id or 0)
    return TokenizerFiles(config=config, named=named, additional=additional, added=tuple(ordered))


def read_object(file: Path) -> dict:
    """A JSON object; {} where there is no such file. ConfigError for anything else."""
    if not file.exists():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file} is not valid JSON ({error}); copy the tokenizer again") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{file} must be a JSON object, not {type(value).__name__}; copy the tokenizer again")
    return value


def _content(token: str | dict) -> str:
    return str(token["content"]) if isinstance(token, dict) else str(token)


def _added(token: str | dict, index: int | None, special: bool = False) -> AddedToken:
    fields = token if isinstance(token, dict) else {"content": token}
    flags = {name: bool(fields.get(name, False)) for name in ("lstrip", "rstrip", "normalized")}
    return AddedToken(content=str(fields["content"]), id=index, special=bool(fields.get("special", special)), **flags)


def _with_flags(added: list[AddedToken], described: list) -> list[AddedToken]:
    """Special tokens of special_tokens_map.json bring their own flags, and may have an id in the vocabulary alone."""
    ids = {token.content: token.id for token in added}
    full = [_added(token, ids.get(_content(token)), special=True) for token in described if isinstance(token, dict)]
    known = {token.content for token in full}
    return [*full, *(token for token in added if token.content not in known)]
