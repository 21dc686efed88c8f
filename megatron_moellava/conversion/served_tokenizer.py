"""A tokenizer for other tools: one tokenizer.json that gives the ids of the training, by the library `tokenizers`.

The class beside it is transformers' plain fast one, which takes that file as it is. Classes with a name (LlamaTokenizer,
...) build the tokenizer anew from rules that differ from version to version: transformers 5 drops SentencePiece's blank
before a text. Neither adds this tokenizer the beginning of a text: the chat template writes it, so that it is there once
whether a tool tokenises the rendered chat with its special tokens (transformers) or without (vLLM).
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_moellava.data.byte_tokenizer import ByteTokenizer
from megatron_moellava.data.encode import IMAGE_TOKEN, encode
from megatron_moellava.data.llama_tokenizer import BLANK, JsonModel, LlamaTokenizer
from megatron_moellava.data.sample import IMAGE_PLACEHOLDER, ImageRef, Sample, Turn
from megatron_moellava.data.templates import Template, prompt
from megatron_moellava.data.tokenizer import INVENTED, Tokenizer, load_tokenizer
from megatron_moellava.data.tokenizer_files import AS_TRAINED, NAMES, TokenizerFiles, read_files, read_object

PROBES = ('What\'s  that, "cat"?\n12 345 \u732b \u00fc\tx', "<image>\nUSER: a <image>\n b", "")
UNIGRAM = 1  # of SentencePiece's TrainerSpec.model_type; 2 is BPE


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedTokenizer:
    """What an export writes, and what its chat template has to know."""

    files: dict[str, dict | Path]  # JSON content or a file to copy, by name
    image_token: int  # id of `<image>`
    bos: str  # text of the beginning-of-text token; "" where training has none
    # What training's tokenizer puts before each stretch of text and this one does not, because it sees BOS or `<image>`
    # before it: the blank of a Llama tokenizer with `legacy: false`. The chat template writes it.
    gap: str = ""
    specials: tuple[str, ...] = ()  # tokens that begin a stretch without it

    def written(self, text: str) -> str:
        """The text of a conversation (`templates.prompt`) as the chat template writes it."""
        none = "|".join(map(re.escape, (IMAGE_PLACEHOLDER, *self.specials)))
        return self.bos + re.sub(rf"(\A|{IMAGE_PLACEHOLDER})(?!\Z|{none})", rf"\1{self.gap}", text)

    def different(self, folder: Path, template: Template) -> list[str]:
        """What it tokenises otherwise than the folder's own tokenizer does in training, of a few conversations."""
        from tokenizers import Tokenizer as Backend

        backend, loaded = Backend.from_str(json.dumps(self.files["tokenizer.json"])), load_tokenizer(folder)
        found = []
        for probe in PROBES:
            turns = tuple(
                Turn(role=role, text=text) for role, text in (("user", probe), ("assistant", "No."), ("user", probe))
            )
            images = tuple(ImageRef(name="") for _ in range(prompt(template, turns).count(IMAGE_PLACEHOLDER)))
            ids, _ = encode(Sample(id="", origin="", turns=turns, images=images), template, loaded)
            expected = [self.image_token if index == IMAGE_TOKEN else index for index in ids]
            text = self.written(prompt(template, turns))
            if backend.encode(text).ids != expected:
                found.append(text)
        return found


def served_tokenizer(folder: Path, *, with_image: bool = True) -> ServedTokenizer:
    """The tokenizer of a folder as one fast one. `with_image`: with `<image>`, as the first id that it lacks.

    ConfigError for a folder that holds no tokenizer.
    """
    loaded, said = load_tokenizer(folder), read_files(folder)
    content = _llama(loaded, folder) if isinstance(loaded, LlamaTokenizer) else _bytes(loaded, folder)
    known = _ids(content)
    image_token = known.get(IMAGE_PLACEHOLDER, max(known.values()) + 1)
    if with_image:
        content["added_tokens"] = [
            token for token in content["added_tokens"] if token["content"] != IMAGE_PLACEHOLDER
        ] + [_added(IMAGE_PLACEHOLDER, image_token, special=True)]
        _fill_holes(content)
    texts = {index: text for text, index in known.items()}
    bos = "" if loaded.bos_id is None else texts[loaded.bos_id]
    files: dict[str, dict | Path] = {"tokenizer.json": content, "tokenizer_config.json": _config(loaded, said, texts)}
    if (model := folder / "tokenizer.model").exists():
        files[model.name] = model
    if not isinstance(loaded, LlamaTokenizer) or loaded.legacy:
        return ServedTokenizer(files=files, image_token=image_token, bos=bos)
    specials = tuple(sorted(loaded.specials))
    return ServedTokenizer(files=files, image_token=image_token, bos=bos, gap=" ", specials=specials)


def _ids(content: dict) -> dict[str, int]:
    """Every token's id; of the words, the vocabulary's."""
    words = content["model"]["vocab"]
    listed = words if isinstance(words, dict) else {word: index for index, (word, _) in enumerate(words)}
    return listed | {token["content"]: token["id"] for token in content["added_tokens"]}


def _fill_holes(content: dict) -> None:
    """Readers number added tokens from the length of the vocabulary on; those with other ids become words of it."""
    words = content["model"]["vocab"]
    beyond = [token for token in content["added_tokens"] if isinstance(words, dict) and token["content"] not in words]
    if [token["id"] for token in beyond] != list(range(len(words), len(words) + len(beyond))):
        content["model"]["vocab"] = words | {token["content"]: token["id"] for token in beyond}


def _added(content: str, index: int, **flags: bool) -> dict:
    off = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return {"id": index, "content": content} | off | flags


def _config(loaded: Tokenizer, said: TokenizerFiles, texts: dict[int, str]) -> dict:
    """tokenizer_config.json. What this program reads to tokenise as before stands under a key of its own."""
    named = {"eos_token": texts[loaded.eos_id], **said.named}
    if loaded.bos_id is not None:
        named["bos_token"] = texts[loaded.bos_id]
    named.setdefault("pad_token", texts.get(loaded.pad_id, named["eos_token"]))
    before: dict[str, Any] = {"add_bos_token": loaded.bos_id is not None}
    if isinstance(loaded, LlamaTokenizer):
        before |= {"tokenizer_class": "LlamaTokenizer", "legacy": loaded.legacy}
        named.setdefault("unk_token", loaded.unk)
    if said.additional:
        before["additional_special_tokens"] = list(said.additional)
    kept = {key: said.config[key] for key in ("model_max_length",) if key in said.config}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{name: named[name] for name in NAMES if name in named},
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        **kept,
        AS_TRAINED: before,
    }


def _bytes(loaded: Tokenizer, folder: Path) -> dict:
    """A byte-level tokenizer is a fast one already; without the padding token that was invented for it, and without BOS."""
    assert isinstance(loaded, ByteTokenizer)
    content = json.loads(loaded.model.backend_tokenizer.to_str())
    if loaded.invented:
        content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != INVENTED]
    return content | {"post_processor": _without_bos(content.get("post_processor"), loaded.bos_id)}


def _without_bos(step: dict | None, bos: int | None) -> dict | None:
    if bos is None or step is None:
        return step
    if step["type"] == "Sequence":
        kept = [_without_bos(part, bos) for part in step["processors"]]
        return step | {"processors": [part for part in kept if part]}
    return None if step["type"] == "TemplateProcessing" else step


def _llama(loaded: LlamaTokenizer, folder: Path) -> dict:
    """The slow LlamaTokenizer's rules as a fast one: blanks before every text, or with `legacy: false` before the first."""
    is_json = isinstance(loaded.vocabulary, JsonModel)
    model, steps = (_json_model(folder), []) if is_json else _sentencepiece_model(folder, loaded.unk)
    blanks = {"type": "Replace", "pattern": {"String": " "}, "content": BLANK}
    first = {"type": "Metaspace", "replacement": BLANK, "prepend_scheme": "first", "split": False}
    normalizers = [*steps, *([{"type": "Prepend", "prepend": BLANK}, blanks] if loaded.legacy else [])]
    decoders = [
        {"type": "Replace", "pattern": {"String": BLANK}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]
    flags = ("lstrip", "rstrip", "normalized", "special")
    added = [
        _added(token.content, int(token.id or 0), **{flag: getattr(token, flag) for flag in flags})
        for token in sorted(loaded.added.values(), key=lambda token: token.id or 0)
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": normalizers} if normalizers else None,
        "pre_tokenizer": None if loaded.legacy else first,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": model,
    }


def _json_model(folder: Path) -> dict:
    return read_object(folder / "tokenizer.json")["model"]


def _sentencepiece_model(folder: Path, unk: str) -> tuple[dict, list[dict]]:
    """(the model of tokenizer.model, what its normalizer does before blanks are put in)"""
    from transformers.convert_slow_tokenizer import generate_merges, import_protobuf

    proto = import_protobuf().ModelProto()
    proto.ParseFromString((folder / "tokenizer.model").read_bytes())
    scores = {piece.piece: piece.score for piece in proto.pieces}
    falls_back = bool(proto.trainer_spec.byte_fallback)
    if proto.trainer_spec.model_type == UNIGRAM:
        words = [[piece.piece, piece.score] for piece in proto.pieces]
        model: dict = {"type": "Unigram", "unk_id": proto.trainer_spec.unk_id, "vocab": words}
    else:
        vocabulary = {piece.piece: index for index, piece in enumerate(proto.pieces)}
        merges = [list(pair) for pair in generate_merges(vocabulary, scores)]
        model = {"type": "BPE", "unk_token": unk, "fuse_unk": True, "vocab": vocabulary, "merges": merges}
    return model | {"byte_fallback": falls_back}, _normalizers(proto.normalizer_spec)


def _normalizers(spec) -> list[dict]:
    from tokenizers import normalizers

    steps = []
    if spec.precompiled_charsmap:
        step = normalizers.Precompiled(spec.precompiled_charsmap)
        steps.append(json.loads(step.__getstate__()))
    if spec.remove_extra_whitespaces:
        steps += [
            {"type": "Strip", "strip_left": True, "strip_right": True},
            {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
        ]
    return steps
