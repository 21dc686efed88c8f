"""Exports that the next tool can use as they are: ends of answers, `<image>`, chat template, processor."""

import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from megatron_moellava.conversion.exports import export_checkpoint
from megatron_moellava.conversion.for_generation import special_ids
from megatron_moellava.conversion.imports import import_checkpoint
from megatron_moellava.conversion.served_tokenizer import served_tokenizer
from megatron_moellava.data import images
from megatron_moellava.data.templates import get_template
from megatron_moellava.data.tokenizer import load_tokenizer
from megatron_moellava.towers import get_tower
from tests.helpers.conversion_models import TOWER, original_config, original_state, write_folder
from tests.helpers.paths import ASSETS
from tests.helpers.tokenizer_folders import llama_folder

TOKENIZERS = {
    "model": lambda place: llama_folder(place, "legacy_true", "model"),
    "json": lambda place: llama_folder(place, "legacy_true", "json"),
    "both": lambda place: llama_folder(place, "legacy_true", "both"),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A dense Llama as released, beside a generation_config.json."""
    folder = tmp_path_factory.mktemp("llama")
    source = write_folder(folder / "source", original_state("llama", "dense"), original_config("llama", "dense"))
    (source / "generation_config.json").write_text(
        json.dumps({"temperature": 0.9, "do_sample": True, "pad_token_id": 0})
    )
    import_checkpoint(source, save=folder / "run", tower=str(TOWER))
    return folder / "run"


@pytest.mark.parametrize("layout", ["original", "transformers", "language-model"])
def test_the_end_of_answers_and_the_sources_settings_are_exported(tmp_path, checkpoint, layout):
    tokenizer = TOKENIZERS["both"](tmp_path / "tok")
    export_checkpoint(checkpoint, save=tmp_path / "out", layout=layout, tokenizer=tokenizer)
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    assert generation.eos_token_id == 2 and generation.temperature == 0.9 and generation.pad_token_id == 0
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["eos_token_id"] == 2


def test_the_templates_end_ends_too(tmp_path):
    folder = llama_folder(tmp_path / "tok", "openchat", "both")
    ids = special_ids(get_template("openchat"), folder, {"eos_token_id": 2})
    assert ids["eos_token_id"] == [2, 330]


def test_an_export_without_a_tokenizer_says_that_nothing_ends(tmp_path):
    config = {key: value for key, value in original_config("llama", "dense").items() if key != "eos_token_id"}
    source = write_folder(tmp_path / "source", original_state("llama", "dense"), config)
    import_checkpoint(source, save=tmp_path / "run", tower=str(TOWER))
    report = export_checkpoint(tmp_path / "run", save=tmp_path / "out", layout="transformers")
    assert any("--tokenizer" in note for note in report["notes"])


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_auto_processor_reads_the_folder(tmp_path, checkpoint, kind):
    tokenizer = TOKENIZERS[kind](tmp_path / "tok")
    before = served_tokenizer(tokenizer).image_token
    export_checkpoint(checkpoint, save=tmp_path / "out", layout="transformers", tokenizer=tokenizer)
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert processor.image_token_id == config["image_token_id"] == before
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    picture = Image.open(ASSETS / "images/wide.png").convert("RGB")
    inputs = processor(images=picture, text=text, return_tensors="pt")
    tower = get_tower(str(TOWER))
    assert int((inputs["input_ids"] == before).sum()) == tower.num_features
    ours = images.preprocess(picture, tower, "pad")
    assert np.abs(inputs["pixel_values"][0].numpy() - ours).max() < 0.03  # one step of 8 bits, divided by the spread
    model = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype=torch.float32)
    grown = model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert grown.shape[1] > inputs["input_ids"].shape[1]


def test_a_tokenizer_with_code_is_neither_asked_about_nor_run(tmp_path, checkpoint, monkeypatch):
    """qwen.tiktoken with auto_map: transformers would ask on stdin whether to run the folder's code."""
    folder = tmp_path / "tok"
    shutil.copytree(qwen_folder(tmp_path), folder)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    export_checkpoint(checkpoint, save=tmp_path / "out", layout="transformers", tokenizer=folder)
    assert not (tmp_path / "ran").exists()


def qwen_folder(place):
    import base64

    folder = place / "qwen"
    folder.mkdir()
    ranks = "\n".join(f"{base64.b64encode(bytes([byte])).decode()} {byte}" for byte in range(256))
    (folder / "qwen.tiktoken").write_text(ranks + "\n")
    config = {
        "tokenizer_class": "QWenTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "tokenization_qwen.py").write_text(f"open({str(place / 'ran')!r}, 'w').close()\n")
    return folder


def test_a_sentencepiece_file_alone_is_exported_as_a_folder_that_transformers_reads(tmp_path, checkpoint):
    """What training takes as data.tokenizer, the advice `give --tokenizer` may be followed with."""
    file = ASSETS / "tok_spm/tokenizer.model"
    export_checkpoint(checkpoint, save=tmp_path / "out", layout="transformers", tokenizer=file)
    ours, theirs = load_tokenizer(file), transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in ("What is this?", "USER: two dogs ASSISTANT:"):
        assert theirs("<s>" + text).input_ids == ours.bos_ids + ours.encode_parsed(text)
    config = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert config["eos_token_id"] == ours.eos_id
