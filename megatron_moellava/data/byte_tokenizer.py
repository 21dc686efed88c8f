"""Byte-level tokenizers (Phi-2, Qwen, StableLM-2, Llama-3): tokenizer.json, vocab.json with merges.txt, or tiktoken ranks.

tokenizer.json is taken as it is written. transformers 5 builds a tokenizer anew from its class's own rules and ignores
the file's normalizer and split pattern, which for StableLM-2 and others gives ids that the model was not trained with.
"""

from collections.abc import Sequence
from pathlib import Path

from megatron_moellava.config import ConfigError
from megatron_moellava.data import qwen_tokenizer, stablelm_tokenizer
from megatron_moellava.data.tokenizer import INVENTED, UNKNOWN_TOKENS, Pieces, Tokenizer
from megatron_moellava.data.tokenizer_files import TokenizerFiles, read_files


class ByteTokenizer(Tokenizer):
    """`model`: a fast tokenizer of transformers."""

    def __init__(self, model, folder: Path):
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        if not getattr(model, "is_fast", False):
            raise ConfigError(
                f"data.tokenizer={folder}: {type(model).__name__} has no character offsets; save it as tokenizer.json"
            )
        if model.eos_token_id is None:
            raise ConfigError(
                f"data.tokenizer={folder} names no eos_token, so that nothing would end an answer; "
                "name it in tokenizer_config.json"
            )
        self.model = model
        reserved = model.get_added_vocab()  # in Qwen's vocabulary "<unk>" is a word like any other
        unknown = next((token for token in UNKNOWN_TOKENS if token in reserved or token == model.unk_token), None)
        if unknown is None:
            unknown = INVENTED
            model.add_special_tokens({"unk_token": unknown})
        self.pad_id = model.convert_tokens_to_ids(unknown)
        self.eos_id = model.eos_token_id
        self.bos_id = model.bos_token_id if self._adds_bos() else None
        self.vocab_size = max(model.get_vocab().values()) + 1
        self.added = model.get_added_vocab()
        self._controls = {index for index, token in model.added_tokens_decoder.items() if token.special}
        self._bytes = {
            letter: byte for byte, letter in bytes_to_unicode().items()
        }  # how such a vocabulary spells bytes

    def _adds_bos(self) -> bool:
        ids = self.model("a").input_ids
        return self.model.bos_token_id is not None and len(ids) > 1 and ids[0] == self.model.bos_token_id

    def encode_parts(self, parts: Sequence[str | int]) -> list[Pieces]:
        return [([part], [0]) if isinstance(part, int) else self._encode(part) for part in parts]

    def _encode(self, text: str) -> Pieces:
        if not text:
            return [], []
        encoded = self.model(
            text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False
        )
        return encoded.input_ids, [start for start, _ in encoded.offset_mapping]

    def encode_parsed(self, text: str) -> list[int]:
        return self.model(text, add_special_tokens=False, split_special_tokens=False, verbose=False).input_ids

    def token_id(self, token: str) -> int | None:
        return self.added.get(token)

    def decode(self, ids: list[int]) -> str:
        return self.model.decode(ids, skip_special_tokens=True)

    def piece(self, index: int) -> bytes:
        token = self.model.convert_ids_to_tokens(index) or ""
        if token in self.added or not set(token) <= self._bytes.keys():
            return token.encode()
        return bytes(self._bytes[letter] for letter in token)

    def is_control(self, index: int) -> bool:
        return index in self._controls or self.model.convert_ids_to_tokens(index) is None


def open_tokenizer(folder: Path) -> ByteTokenizer | None:
    """The tokenizer of a folder; None where it has none of the files."""
    if (folder / "tokenizer.json").exists():
        return ByteTokenizer(_from_json(folder, read_files(folder)), folder)
    for kind, open_ranks in (
        (qwen_tokenizer, qwen_tokenizer.qwen_tokenizer),
        (stablelm_tokenizer, stablelm_tokenizer.stablelm_tokenizer),
    ):
        if (folder / kind.RANKS).exists():
            return ByteTokenizer(open_ranks(folder), folder)
    if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        from transformers import AutoTokenizer

        read_files(folder)  # a clear error for a damaged one
        model = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        return ByteTokenizer(model, folder)
    return None


def _from_json(folder: Path, files: TokenizerFiles):
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Backend
    from transformers import PreTrainedTokenizerFast

    backend = Backend.from_file(str(folder / "tokenizer.json"))
    for token in files.added:
        if backend.token_to_id(token.content) is None:
            flags = {"lstrip": token.lstrip, "rstrip": token.rstrip, "normalized": token.normalized}
            backend.add_tokens([AddedToken(token.content, special=token.special, **flags)])
        if backend.token_to_id(token.content) != token.id:
            raise ConfigError(
                f"data.tokenizer={folder}: {token.content} has id {backend.token_to_id(token.content)} in "
                f"tokenizer.json and {token.id} beside it; copy the tokenizer's files again, all from one place"
            )
    settings: dict = dict(files.named)
    if "clean_up_tokenization_spaces" in files.config:
        settings["clean_up_tokenization_spaces"] = files.config["clean_up_tokenization_spaces"]
    return PreTrainedTokenizerFast(tokenizer_object=backend, **settings)
