"""The tokenizer of an export gives training's ids, to transformers and to this program."""

import json
import shutil
from pathlib import Path

import pytest
import transformers

from megatron_moellava.conversion.served_tokenizer import served_tokenizer
from megatron_moellava.data.templates import TEMPLATES, get_template
from megatron_moellava.data.tokenizer import load_tokenizer
from tests.helpers.tokenizer_folders import BYTES, LLAMA, byte_folder, llama_folder

FOLDERS = {
    **{
        f"{name}, {kind}": (llama_folder, name, kind) for name in LLAMA["folders"] for kind in ("model", "json", "both")
    },
    **{name: (byte_folder, name) for name in BYTES["folders"]},
}
PROBES = LLAMA["probes"]
EATS = "<tool>b"  # of the `strips` folders: begins with a token that eats the blank which a fast tokenizer would see


def made(place: Path, name: str) -> Path:
    make, *arguments = FOLDERS[name]
    return make(place / "source", *arguments)


def written(served, place: Path) -> Path:
    place.mkdir()
    for name, content in served.files.items():
        shutil.copy(content, place) if isinstance(content, Path) else (place / name).write_text(json.dumps(content))
    return place


@pytest.mark.parametrize("name", FOLDERS)
def test_transformers_and_this_program_give_the_ids_of_the_training(tmp_path, name):
    source = made(tmp_path, name)
    before, served = load_tokenizer(source), served_tokenizer(source)
    export = written(served, tmp_path / "export")
    theirs, after = transformers.AutoTokenizer.from_pretrained(export), load_tokenizer(export)
    for probe in PROBES:
        assert after.bos_ids + after.encode_parsed(probe) == before.bos_ids + before.encode_parsed(probe), probe
        assert after.encode_text(probe) == before.encode_text(probe), probe
        expected = before.bos_ids + before.encode_parsed(probe)
        if not (name.startswith("strips_false") and probe == EATS):
            assert theirs(served.written(probe)).input_ids == expected, probe
    assert (after.eos_id, after.bos_id) == (before.eos_id, before.bos_id)
    image = theirs("<image>", add_special_tokens=False).input_ids
    assert image == [served.image_token] and served.image_token == len(theirs) - 1


@pytest.mark.parametrize("version", TEMPLATES)
@pytest.mark.parametrize(
    "name", ["legacy_true, model", "legacy_false, both", "openchat_false, json", "Qwen2Tokenizer_saved"]
)
def test_a_conversation_has_the_ids_of_the_training(tmp_path, name, version):
    source = made(tmp_path, name)
    assert served_tokenizer(source).different(source, get_template(version)) == []
