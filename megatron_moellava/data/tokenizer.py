"""A tokenizer behind one small interface, and the reader that finds out what kind of tokenizer a folder holds.

Two things matter here that ordinary tokenizer calls hide. Text of a conversation is never parsed for special tokens
(`</s>` in a question is five characters, not the end of the answer), unless the original's behaviour is asked for. And
every token knows where in the text it starts, so that labels are masked by position, not by counting tokens twice.

There is one tokenisation, that of transformers 4.37's slow classes, which the original uses (`use_fast=False`): the same
ids whether a folder brings tokenizer.model, tokenizer.json or both. No code of a folder is ever run.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

from megatron_moellava.config import ConfigError

# Padding is the unknown token, as in the original (specification 3.5): the native one (Llama, Mistral, MiniCPM),
# StableLM-2's, Qwen-1's and Llama-3's reserved ones, else a new token (Phi-2, Qwen1.5).
UNKNOWN_TOKENS = ("<unk>", "<|reg0|>", "<|extra_0|>", "<|reserved_special_token_0|>")
INVENTED = "<|extra_0|>"
Pieces = tuple[list[int], list[int]]  # ids, and the character of the text at which each starts


class Tokenizer(ABC):
    """bos_id (None: the tokenizer adds none), eos_id, pad_id, vocab_size, and the methods below."""

    bos_id: int | None
    eos_id: int
    pad_id: int
    vocab_size: int  # ids are below this; may exceed the model's when a padding token had to be invented

    @abstractmethod
    def encode_parts(self, parts: Sequence[str | int]) -> list[Pieces]:
        """One stretch of a prompt (what lies between two images), cut into texts and ids of control tokens, no BOS.

        Special tokens inside a text are text. What a text becomes may depend on its place: with `legacy: false` a
        Llama tokenizer puts a blank before the text that begins a stretch, and none after a control token.
        """

    @abstractmethod
    def encode_parsed(self, text: str) -> list[int]:
        """ids, no BOS, special tokens parsed: the original's way."""

    @abstractmethod
    def token_id(self, token: str) -> int | None:
        """The id of a control token or an added token; None for what is merely a word of the vocabulary."""

    @abstractmethod
    def decode(self, ids: list[int]) -> str:
        """Text, without special tokens."""

    @abstractmethod
    def piece(self, index: int) -> bytes:
        """What one token adds to a text, in UTF-8, be it a part of a character; a control token's name; b"": no token."""

    @abstractmethod
    def is_control(self, index: int) -> bool:
        """Whether an id adds nothing to a text: a control token, or no token at all."""

    def encode_text(self, text: str) -> Pieces:
        """(ids, start character of each) of a stretch that is one text."""
        return self.encode_parts([text])[0]

    @property
    def bos_ids(self) -> list[int]:
        """BOS as a list; empty for a tokenizer that has none."""
        return [] if self.bos_id is None else [self.bos_id]


def load_tokenizer(path: str | Path) -> Tokenizer:
    """A SentencePiece .model file, or a folder with a tokenizer as the hub, the original or this program writes it.

    Raises ConfigError for a folder without a tokenizer, with a damaged one, or with one that only its own code can read.
    """
    from megatron_moellava.data import byte_tokenizer, llama_tokenizer

    given = Path(path).expanduser()
    is_model = given.is_file() and given.suffix == ".model"
    if not is_model and not given.is_dir():
        raise ConfigError(f"data.tokenizer={path} is neither a folder nor a SentencePiece .model file; give one")
    try:
        found = llama_tokenizer.open_tokenizer(given) or byte_tokenizer.open_tokenizer(given)
    except ConfigError:
        raise
    except (
        Exception
    ) as error:  # sentencepiece, tokenizers and transformers raise whatever they like, Exception included
        raise ConfigError(
            f"data.tokenizer={path} cannot be read ({type(error).__name__}: {error}); {ADVICE}"
        ) from error
    if found is None:
        held = sorted(item.name for item in given.iterdir())[:8]
        raise ConfigError(
            f"data.tokenizer={path} holds no tokenizer that can be read without running its code "
            f"(it holds {', '.join(held) or 'nothing'}); {ADVICE}"
        )
    return found


ADVICE = (
    "give a folder with tokenizer.json, tokenizer.model, vocab.json and merges.txt, qwen.tiktoken or arcade100k.tiktoken, "
    "as the language model's own folder has them"
)
