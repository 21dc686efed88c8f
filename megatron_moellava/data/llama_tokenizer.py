"""Tokenizers of the Llama family (Llama-1 and -2, Vicuna, Mistral, OpenChat, MiniCPM): ids of the slow LlamaTokenizer.

Rules of transformers 4.37 (`tokenization_utils.py: tokenize`, `tokenization_llama.py: _tokenize`): added tokens are cut
out first; each text between them goes to SentencePiece, which puts a blank before it. With `legacy: false` only the text
that begins the call gets one, and none where a special token comes first. The vocabulary is tokenizer.model, or, in a
folder without it, the BPE model of tokenizer.json; the file's own normalizer and pre-tokenizer differ from version to
version and are not used.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from megatron_moellava.config import ConfigError
from megatron_moellava.data.tokenizer import Pieces, Tokenizer
from megatron_moellava.data.tokenizer_files import AddedToken, TokenizerFiles, read_files, read_object

FAMILY = ("Llama", "CodeLlama", "Mistral", "Gemma")  # tokenizer classes: they also put BOS first by default
BLANK = "\u2581"  # SentencePiece's blank
BYTE = re.compile("<0x([0-9A-F]{2})>")  # the name of a token that is one byte of a character without a token
# Appended to a serialised model it is merged into it: ModelProto.normalizer_spec (3) .add_dummy_prefix (3) = false.
NO_PREFIX = b"\x1a\x02\x18\x00"
DEFAULTS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


class Vocabulary(Protocol):
    """A SentencePiece model, wherever it is stored."""

    size: int

    def encode(self, text: str) -> Pieces: ...
    def decode(self, ids: list[int]) -> str: ...  # without the blank that `encode` puts first, if it does
    def id_of(self, piece: str) -> int | None: ...
    def piece(self, index: int) -> str: ...  # as the vocabulary writes it: BLANK, <0x0A>; "" for an id without one
    def controls(self) -> list[str]: ...


class SentencePieceModel:
    """tokenizer.model. `prefix`: a blank before every text, as the model says it; else none."""

    def __init__(self, file: Path, *, prefix: bool):
        import sentencepiece

        proto = file.read_bytes()
        self.model = sentencepiece.SentencePieceProcessor()
        try:
            self.model.LoadFromSerializedProto(proto if prefix else proto + NO_PREFIX)
        except RuntimeError as error:
            raise ConfigError(
                f"data.tokenizer: {file} is not a SentencePiece model; copy it again, or give the folder that has the "
                "language model's tokenizer.json"
            ) from error
        self.size = self.model.vocab_size()

    def encode(self, text: str) -> Pieces:
        pieces = self.model.encode(text, return_type="proto").pieces
        starts = [piece.begin for piece in pieces]  # bytes
        if not text.isascii():
            character = [i for i, letter in enumerate(text) for _ in letter.encode()] + [len(text)]
            starts = [character[start] for start in starts]
        return [piece.id for piece in pieces], starts

    def decode(self, ids: list[int]) -> str:
        return self.model.decode(ids)

    def id_of(self, piece: str) -> int | None:
        index = self.model.piece_to_id(piece)
        return index if self.model.id_to_piece(index) == piece else None

    def piece(self, index: int) -> str:
        return self.model.id_to_piece(index) if index < self.size else ""

    def controls(self) -> list[str]:
        ids = range(self.size)
        return [self.model.id_to_piece(i) for i in ids if self.model.is_control(i) or self.model.is_unknown(i)]


class JsonModel:
    """The BPE model of tokenizer.json; blanks are put in here."""

    def __init__(self, content: dict, *, prefix: bool):
        from tokenizers import Tokenizer as Backend
        from tokenizers import decoders

        bare = {"version": content.get("version", "1.0"), "added_tokens": [], "model": content["model"]}
        bare |= dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
        self.backend, self.prefix = Backend.from_str(json.dumps(bare)), prefix
        steps = [decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse()]
        self.backend.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if prefix else [])])
        self.size = self.backend.get_vocab_size()
        self._special = [token["content"] for token in content.get("added_tokens", ()) if token.get("special")]

    def encode(self, text: str) -> Pieces:
        shift = len(BLANK) if self.prefix else 0
        encoded = self.backend.encode(BLANK[:shift] + text.replace(" ", BLANK))
        return encoded.ids, [max(start - shift, 0) for start, _ in encoded.offsets]

    def decode(self, ids: list[int]) -> str:
        return self.backend.decode(ids, skip_special_tokens=False)

    def id_of(self, piece: str) -> int | None:
        return self.backend.token_to_id(piece)

    def piece(self, index: int) -> str:
        return self.backend.id_to_token(index) or ""

    def controls(self) -> list[str]:
        return [token for token in self._special if self.id_of(token) is not None]


@dataclass(frozen=True, slots=True)
class _Chunk:
    text: str
    part: int
    start: int  # of the text in its part
    token: AddedToken | None = None


class LlamaTokenizer(Tokenizer):
    """The slow LlamaTokenizer's rules; `legacy` is the field of tokenizer_config.json."""

    def __init__(self, vocabulary: Vocabulary, files: TokenizerFiles, *, legacy: bool):
        self.vocabulary, self.legacy = vocabulary, legacy
        named = DEFAULTS | files.named
        self._specials = {*named.values(), *files.additional}
        self.added = self._added(files, named)
        self._by_id = {token.id: token for token in self.added.values()}
        self.unk = named["unk_token"]
        self.eos_id = self._named_id(named["eos_token"], "eos_token")
        self.pad_id = self._named_id(self.unk, "unk_token")
        self.bos_id = self.token_id(named["bos_token"]) if files.config.get("add_bos_token", True) else None
        self.vocab_size = max(vocabulary.size, *(index + 1 for index in self._by_id if index is not None))
        self._all = _pattern(self.added)
        self._words = _pattern(text for text, token in self.added.items() if not token.special)
        self._unk_length = len(vocabulary.encode(self.unk)[0])

    def _added(self, files: TokenizerFiles, named: dict[str, str]) -> dict[str, AddedToken]:
        """Every token that is cut out of a text, with its id: the vocabulary's, the files', else the next free one."""
        listed = {text: AddedToken(content=text, special=True) for text in self.vocabulary.controls()}
        listed |= {token.content: token for token in files.added}
        for text in (*named.values(), *files.additional):
            listed.setdefault(text, AddedToken(content=text, special=True))
        taken = [token.id + 1 for token in listed.values() if token.id is not None]
        free, found = max([self.vocabulary.size, *taken]), {}
        for text, token in listed.items():
            index = self.vocabulary.id_of(text) if token.id is None else token.id
            found[text] = replace(token, id=free if index is None else index)
            free += index is None
        return found

    def _named_id(self, token: str, name: str) -> int:
        index = self.token_id(token)
        assert index is not None, f"{name} {token} was added above"
        return index

    def encode_parts(self, parts: Sequence[str | int]) -> list[Pieces]:
        chunks: list[_Chunk] = []
        for number, part in enumerate(parts):
            if isinstance(part, int):
                token = self._by_id.get(part, AddedToken(content=BLANK, id=part, special=True))
                chunks.append(_Chunk(token.content, number, 0, token))
            else:
                chunks += self._cut(part, number, self._words)
        found: list[Pieces] = [([], []) for _ in parts]
        for part, index, start in self._ids(chunks):
            found[part][0].append(index)
            found[part][1].append(start)
        return found

    def encode_parsed(self, text: str) -> list[int]:
        return [index for _, index, _ in self._ids(self._cut(text, 0, self._all))]

    def _cut(self, text: str, part: int, pattern: re.Pattern | None) -> list[_Chunk]:
        start, chunks = 0, []
        for number, piece in enumerate(pattern.split(text) if pattern else [text]):
            if piece:
                chunks.append(_Chunk(piece, part, start, self.added[piece] if number % 2 else None))
                start += len(piece)
        return chunks

    def _ids(self, chunks: list[_Chunk]) -> Iterator[tuple[int, int, int]]:
        """(part, id, start) of every token."""
        for chunk in _stripped(chunks if self.legacy else self._prefixed(chunks)):
            if chunk.token is not None:
                yield chunk.part, int(chunk.token.id or 0), chunk.start
            elif chunk.text:
                for index, start in zip(*self._encode(chunk.text), strict=True):
                    yield chunk.part, index, max(chunk.start + start, 0)

    def _prefixed(self, chunks: list[_Chunk]) -> list[_Chunk]:
        """`legacy: false`: one blank before the stretch, but not before a special token that begins it."""
        chunks = [chunk if chunk.token else replace(chunk, text=chunk.text.replace(BLANK, " ")) for chunk in chunks]
        if not chunks or (chunks[0].token and chunks[0].token.content in self._specials):
            return chunks
        if chunks[0].token:
            return [_Chunk(BLANK, chunks[0].part, 0), *chunks]
        return [replace(chunks[0], text=BLANK + chunks[0].text, start=chunks[0].start - 1), *chunks[1:]]

    def _encode(self, text: str) -> Pieces:
        if self.legacy or not text.startswith((BLANK, " ")):
            return self.vocabulary.encode(text)
        ids, starts = self.vocabulary.encode(self.unk + text)  # SentencePiece strips a blank that comes first
        return ids[self._unk_length :], [start - len(self.unk) for start in starts[self._unk_length :]]

    def token_id(self, token: str) -> int | None:
        return self.added[token].id if token in self.added else None

    def decode(self, ids: list[int]) -> str:
        text, words = "", []
        for index in ids:
            token = self._by_id.get(index)
            if token is None:
                words.append(index)
            elif not token.special:
                text, words = text + self._decode(words) + token.content, []
        text += self._decode(words)
        return text if self.legacy else text.removeprefix(" ")  # the vocabulary itself takes away what it put there

    def _decode(self, ids: list[int]) -> str:
        return self.vocabulary.decode(ids) if ids else ""

    def piece(self, index: int) -> bytes:
        if index in self._by_id:
            return self._by_id[index].content.encode()
        piece = self.vocabulary.piece(index)
        byte = BYTE.fullmatch(piece)
        return bytes([int(byte[1], 16)]) if byte else piece.replace(BLANK, " ").encode()

    def is_control(self, index: int) -> bool:
        return self._by_id[index].special if index in self._by_id else not self.vocabulary.piece(index)


def _pattern(tokens: Iterable[str]) -> re.Pattern | None:
    """Splits at tokens, the longest that begins at a place first."""
    ordered = sorted(filter(None, tokens), key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, ordered)) + ")") if ordered else None


def _stripped(chunks: list[_Chunk]) -> list[_Chunk]:
    """Blanks beside a token that eats them are gone."""
    chunks = list(chunks)
    for number, chunk in enumerate(chunks):
        if chunk.token is None:
            continue
        if chunk.token.rstrip and number + 1 < len(chunks) and chunks[number + 1].token is None:
            right = chunks[number + 1]
            text = right.text.lstrip()
            chunks[number + 1] = replace(right, text=text, start=right.start + len(right.text) - len(text))
        if chunk.token.lstrip and number and chunks[number - 1].token is None:
            chunks[number - 1] = replace(chunks[number - 1], text=chunks[number - 1].text.rstrip())
    return chunks


def open_tokenizer(path: Path) -> LlamaTokenizer | None:
    """The tokenizer of a .model file or of a folder; None where it is not of this family."""
    if path.is_file():
        return LlamaTokenizer(SentencePieceModel(path, prefix=True), TokenizerFiles(), legacy=True)
    files, model, table = read_files(path), path / "tokenizer.model", path / "tokenizer.json"
    content = read_object(table)
    ours = (files.tokenizer_class or FAMILY[0]).startswith(FAMILY)
    if model.exists() and (ours or not content):
        legacy = files.config.get("legacy") is not False  # 4.37: not said means legacy
        files = _completed(files, content) if "added_tokens_decoder" not in files.config else files
        config = {"add_bos_token": ours} | files.config
        vocabulary = SentencePieceModel(model, prefix=legacy)
        return LlamaTokenizer(vocabulary, replace(files, config=config), legacy=legacy)
    if not ours or not _is_sentencepiece(content):
        return None
    said = files.config.get("legacy")
    legacy = said if said is not None else (content.get("pre_tokenizer") or {}).get("prepend_scheme") != "first"
    return LlamaTokenizer(JsonModel(content, prefix=legacy), _completed(files, content), legacy=legacy)


def _is_sentencepiece(content: dict) -> bool:
    """Whether a tokenizer.json is a SentencePiece BPE model that puts blanks before texts."""
    model, steps = content.get("model") or {}, json.dumps([content.get("normalizer"), content.get("pre_tokenizer")])
    prefixed = '"Prepend"' in steps or ('"Metaspace"' in steps and '"never"' not in steps)
    return model.get("type") == "BPE" and bool(model.get("byte_fallback")) and prefixed


def _completed(files: TokenizerFiles, content: dict) -> TokenizerFiles:
    """With the tokens that tokenizer.json adds; what the small files say of a token goes first."""
    known = {token.content for token in files.added}
    fields = ("content", "id", "special", "lstrip", "rstrip", "normalized")
    listed = [
        AddedToken(**{name: token[name] for name in fields if name in token})
        for token in content.get("added_tokens", ())
    ]
    return replace(files, added=(*files.added, *(token for token in listed if token.content not in known)))
