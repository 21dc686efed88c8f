"""Tokenizer folders as the hub and the original write them, made of the small vocabularies of the golden assets."""

import json
import shutil
from pathlib import Path

from tests.helpers.paths import ASSETS, GOLDEN

RECORDED = GOLDEN / "tokenizers"
LLAMA = json.loads((RECORDED / "llama.json").read_text(encoding="utf-8"))
BYTES = json.loads((RECORDED / "bytes.json").read_text(encoding="utf-8"))


def ids_of(recorded: dict, name: str) -> list[list[int]]:
    """What transformers 4.37's slow tokenizer gives for each probe; a folder may name another with the same ids."""
    ids = recorded["folders"][name]["ids"]
    return ids_of(recorded, ids) if isinstance(ids, str) else ids


def llama_folder(place: Path, name: str, vocabulary: str) -> Path:
    """`vocabulary`: "model", "json" (4.37's fast tokenizer), or "both"."""
    files = LLAMA["folders"][name]["files"]
    write_files(place, files)
    if vocabulary in ("model", "both"):
        shutil.copy(ASSETS / "tok_spm/tokenizer.model", place)
    if vocabulary in ("json", "both"):
        content = json.loads((RECORDED / "tokenizer.json").read_text(encoding="utf-8"))
        content["added_tokens"] = json_tokens(files, content["added_tokens"])
        (place / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    return place


def json_tokens(files: dict, base: list[dict]) -> list[dict]:
    """tokenizer.json's added tokens: those of the small files, as the fast tokenizer saves them."""
    decoder = files.get("tokenizer_config.json", {}).get("added_tokens_decoder", {})
    tokens = {int(index): {"id": int(index)} | token for index, token in decoder.items()}
    for text, index in files.get("added_tokens.json", {}).items():
        flags = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized", "special"), False)
        tokens.setdefault(index, {"id": index, "content": text} | flags)
    return list({token["id"]: token for token in (*base, *tokens.values())}.values())


def byte_folder(place: Path, name: str) -> Path:
    """vocab.json and merges.txt, as a slow tokenizer is saved."""
    write_files(place, BYTES["folders"][name]["files"])
    for file in ("vocab.json", "merges.txt"):
        shutil.copy(ASSETS / "tok_bpe" / file, place)
    return place


def write_files(place: Path, files: dict) -> None:
    place.mkdir(parents=True, exist_ok=True)
    for file, content in files.items():
        (place / file).write_text(json.dumps(content), encoding="utf-8")
