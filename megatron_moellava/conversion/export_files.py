"""The small files of an export: the tokenizer's, and those that are made."""

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from megatron_moellava.config import ConfigError
from megatron_moellava.data.llama_tokenizer import DEFAULTS
from megatron_moellava.data.tokenizer import load_tokenizer

TOKENIZER_FILES = (
    "token",
    "vocab",
    "merges",
    "special_tokens",
    "added_tokens",
    "chat_template",
    "spiece",
    "qwen.tiktoken",
    "arcade100k.tiktoken",
)


@contextlib.contextmanager
def as_folder(tokenizer: Path | None) -> Iterator[Path | None]:
    """The tokenizer as a folder: a SentencePiece .model alone, which training takes too, gets what transformers wants."""
    if tokenizer is None or not Path(tokenizer).is_file():
        yield Path(tokenizer) if tokenizer else None
        return
    load_tokenizer(tokenizer)  # a ConfigError for a file that is none
    with tempfile.TemporaryDirectory() as made:
        shutil.copyfile(tokenizer, Path(made) / "tokenizer.model")
        config = {"tokenizer_class": "LlamaTokenizer", "legacy": True, "add_bos_token": True, **DEFAULTS}
        (Path(made) / "tokenizer_config.json").write_text(json.dumps(config, indent=1))
        yield Path(made)


def tokenizer_files(folder: Path, taken: dict) -> dict[str, Path]:
    """The tokenizer's files, but for those that the export has itself. ConfigError for a folder that holds none."""
    files = {
        file.name: file
        for file in sorted(folder.iterdir())
        if file.is_file() and (file.name.startswith(TOKENIZER_FILES) or file.suffix == ".py")
    }
    if not files:
        raise ConfigError(f"--tokenizer {folder} holds no tokenizer files; give the folder of the language model")
    return {name: file for name, file in files.items() if name not in taken}


def write_files(folder: Path, files: dict[str, dict | Path | str]) -> None:
    """By name: JSON content, a file to copy, or text."""
    for name, content in files.items():
        if isinstance(content, Path):
            shutil.copyfile(content, folder / name)
        elif isinstance(content, str):
            (folder / name).write_text(content, encoding="utf-8")
        else:
            (folder / name).write_text(json.dumps(content, indent=2) + "\n")
