"""What GGUF files say of a vocabulary, as llama.cpp reads it."""

import pytest
from gguf import GGUFReader, GGUFWriter, TokenType

from megatron_moellava.backbones import get_backbone
from megatron_moellava.conversion.gguf_metadata import describe_tower, describe_vocabulary
from megatron_moellava.conversion.served_tokenizer import served_tokenizer
from megatron_moellava.data.tokenizer import load_tokenizer
from megatron_moellava.towers import get_tower
from tests.helpers.tokenizer_folders import byte_folder, llama_folder


def described(place, folder, backbone: str) -> dict:
    writer = GGUFWriter(place / "vocabulary.gguf", "llama")
    describe_vocabulary(writer, served_tokenizer(folder, with_image=False), folder, get_backbone(backbone), "{{ bos }}")
    return read_back(writer, place / "vocabulary.gguf")


def read_back(writer: GGUFWriter, file) -> dict:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return {name: field.contents() for name, field in GGUFReader(file).fields.items()}


@pytest.mark.parametrize("legacy", ["legacy_true", "legacy_false"])
def test_a_sentencepiece_vocabulary(tmp_path, legacy):
    folder = llama_folder(tmp_path / "tokenizer", legacy, "both")
    found, loaded = described(tmp_path, folder, "llama-tiny"), load_tokenizer(folder)
    tokens, kinds = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert len(tokens) == len(kinds) == len(found["tokenizer.ggml.scores"]) == 512
    assert (
        tokens[loaded.bos_id] == "<s>" and kinds[loaded.bos_id] == TokenType.CONTROL and kinds[0] == TokenType.UNKNOWN
    )
    assert kinds[tokens.index("<0x0A>")] == TokenType.BYTE and kinds[-1] == TokenType.UNUSED
    assert found["tokenizer.ggml.add_space_prefix"] == (legacy == "legacy_true")
    assert found["tokenizer.ggml.add_bos_token"] and found["tokenizer.ggml.eos_token_id"] == loaded.eos_id


def test_a_byte_level_vocabulary(tmp_path):
    found = described(tmp_path, byte_folder(tmp_path / "tokenizer", "Qwen2Tokenizer_plain"), "qwen2-tiny")
    assert found["tokenizer.ggml.model"] == "gpt2" and found["tokenizer.ggml.pre"] == "qwen2"
    assert found["tokenizer.ggml.tokens"][420] == "<|im_start|>" and not found["tokenizer.ggml.add_bos_token"]
    assert found["tokenizer.ggml.merges"] and found["tokenizer.chat_template"] == "{{ bos }}"


@pytest.mark.parametrize("name", ["clip-vit-large-patch14-336", "siglip-so400m-patch14-384"])
def test_features_come_from_the_last_layer_of_the_file(tmp_path, name):
    """llama.cpp takes them one layer earlier where a file does not say it (tests/llama_cpp has seen that)."""
    writer, tower = GGUFWriter(tmp_path / "tower.gguf", "clip"), get_tower(name)
    describe_tower(writer, tower, 64, "f16")
    found = read_back(writer, tmp_path / "tower.gguf")
    assert found["clip.vision.feature_layer"] == [found["clip.vision.block_count"]] == [tower.num_used_layers]
