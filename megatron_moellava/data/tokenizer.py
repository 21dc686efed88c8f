"""A tokenizer behind one small interface: a SentencePiece model or a folder with a Hugging Face tokenizer.

Two things matter here that ordinary tokenizer calls hide. Text of a conversation is never parsed for special tokens
(`</s>` in a question is five characters, not the end of the answer), unless the original's behaviour is asked for. And
every token knows where in the text it starts, so that labels are masked by position, not by counting tokens twice.
Every piece of text is tokenised on its own, with SentencePiece's leading blank: that is what the slow tokenizers do
which the original uses (`use_fast=False`, legacy prefix).
"""

import json
import re
from abc import ABC, abstractmethod
from pathlib import Path

from megatron_moellava.config import ConfigError
from megatron_moellava.data.qwen_tokenizer import RANKS, qwen_tokenizer

# Padding is the unknown token, as in the original (specification 3.5): the native one (Llama, Mistral, MiniCPM),
# StableLM-2's reserved one, Qwen-1's reserved one, else a new token with this name (Phi-2, Qwen1.5).
UNKNOWN_TOKENS = ("<unk>", "<|reg0|>", "<|extra_0|>")
BOS_CLASSES = ("Llama", "CodeLlama", "Mistral", "Gemma")  # tokenizer classes that put BOS first by default


class Tokenizer(ABC):
    """bos_id (None: the tokenizer adds none), eos_id, pad_id, vocab_size, and the methods below."""

    bos_id: int | None
    eos_id: int
    pad_id: int
    vocab_size: int  # ids are below this; may exceed the model's when a padding token had to be invented

    @abstractmethod
    def encode_text(self, text: str) -> tuple[list[int], list[int]]:
        """(ids, start character of each), no BOS, special tokens taken as text."""

    @abstractmethod
    def encode_parsed(self, text: str) -> list[int]:
        """ids, no BOS, special tokens parsed: the original's way."""

    @abstractmethod
    def token_id(self, token: str) -> int | None:
        """The id of a token that is in the vocabulary as a whole."""

    @abstractmethod
    def decode(self, ids: list[int]) -> str:
        """Text, without special tokens."""

    @property
    def bos_ids(self) -> list[int]:
        return [] if self.bos_id is None else [self.bos_id]


class SentencePieceTokenizer(Tokenizer):
    def __init__(self, model_file: str | Path, *, add_bos: bool = True):
        import sentencepiece

        self.model = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
        self.bos_id = self.model.bos_id() if add_bos and self.model.bos_id() >= 0 else None
        self.eos_id = self.model.eos_id()
        self.pad_id = self.model.unk_id()
        self.vocab_size = self.model.vocab_size()
        self._specials = [
            self.model.id_to_piece(i)
            for i in range(self.vocab_size)
            if self.model.is_control(i) or self.model.is_unknown(i)
        ]
        self._split = re.compile("(" + "|".join(map(re.escape, self._specials)) + ")")

    def encode_text(self, text: str) -> tuple[list[int], list[int]]:
        if not text:
            return [], []
        pieces = self.model.encode(text, return_type="proto").pieces
        starts = [piece.begin for piece in pieces]  # bytes
        if not text.isascii():
            character = [i for i, letter in enumerate(text) for _ in letter.encode()] + [len(text)]
            starts = [character[start] for start in starts]
        return [piece.id for piece in pieces], starts

    def encode_parsed(self, text: str) -> list[int]:
        ids = []
        for part in self._split.split(text):
            if part in self._specials:
                ids.append(self.model.piece_to_id(part))
            elif part:
                ids.extend(self.model.encode(part))
        return ids

    def token_id(self, token: str) -> int | None:
        index = self.model.piece_to_id(token)
        return index if self.model.id_to_piece(index) == token else None

    def decode(self, ids: list[int]) -> str:
        return self.model.decode([i for i in ids if not self.model.is_control(i)])


class HuggingFaceTokenizer(Tokenizer):
    def __init__(self, folder: str | Path):
        from transformers import AutoTokenizer

        if (Path(folder) / RANKS).exists() and not (Path(folder) / "tokenizer.json").exists():
            self.model = qwen_tokenizer(Path(folder))
        else:
            self.model = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        if not self.model.is_fast:
            raise ConfigError(
                f"data.tokenizer={folder}: {type(self.model).__name__} has no character offsets; "
                "save it as tokenizer.json, or give the SentencePiece .model file"
            )
        reserved = self.model.get_added_vocab()  # in Qwen's vocabulary "<unk>" is a word like any other
        unknown = next((token for token in UNKNOWN_TOKENS if token in reserved or token == self.model.unk_token), None)
        if unknown is None:
            unknown = UNKNOWN_TOKENS[-1]
            self.model.add_special_tokens({"unk_token": unknown})
        self.pad_id = self.model.convert_tokens_to_ids(unknown)
        self.eos_id = self.model.eos_token_id
        self.bos_id = self.model.bos_token_id if self._adds_bos() else None
        self.vocab_size = max(self.model.get_vocab().values()) + 1

    def _adds_bos(self) -> bool:
        ids = self.model("a").input_ids
        return self.model.bos_token_id is not None and len(ids) > 1 and ids[0] == self.model.bos_token_id

    def encode_text(self, text: str) -> tuple[list[int], list[int]]:
        if not text:
            return [], []
        encoded = self.model(
            text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False
        )
        return encoded.input_ids, [start for start, _ in encoded.offset_mapping]

    def encode_parsed(self, text: str) -> list[int]:
        return self.model(text, add_special_tokens=False, split_special_tokens=False, verbose=False).input_ids

    def token_id(self, token: str) -> int | None:
        return self.model.get_vocab().get(token)

    def decode(self, ids: list[int]) -> str:
        return self.model.decode(ids, skip_special_tokens=True)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """A SentencePiece .model file, or a folder that holds a Hugging Face tokenizer or a tokenizer.model."""
    path = Path(path)
    if path.is_file() and path.suffix == ".model":
        return SentencePieceTokenizer(path)
    if not path.is_dir():
        raise ConfigError(f"data.tokenizer={path} is neither a folder nor a SentencePiece .model file; give one")
    if (path / "tokenizer.model").exists() and not (path / "tokenizer.json").exists():
        config = path / "tokenizer_config.json"
        settings = json.loads(config.read_text()) if config.exists() else {}
        by_class = str(settings.get("tokenizer_class", "Llama")).startswith(BOS_CLASSES)
        return SentencePieceTokenizer(path / "tokenizer.model", add_bos=settings.get("add_bos_token", by_class))
    return HuggingFaceTokenizer(path)
