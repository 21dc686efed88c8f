"""Files are complete or absent."""

import json

import pytest
import torch
from safetensors.torch import load_file

from megatron_moellava.config import ConfigError
from megatron_moellava.conversion import writers
from megatron_moellava.conversion.exports import export_checkpoint
from megatron_moellava.conversion.imports import import_checkpoint
from megatron_moellava.conversion.megatron_checkpoint import open_checkpoint
from tests.helpers.conversion_models import TOWER, original_config, original_state, read, write_folder


def test_interrupted_conversion_leaves_nothing_that_loads(tmp_path):
    source = write_folder(tmp_path / "source", original_state("llama", "dense"), original_config("llama", "dense"))

    class Interrupted(BaseException):
        pass

    def interrupt(count):
        raise Interrupted

    with pytest.raises(Interrupted):
        import_checkpoint(source, save=tmp_path / "run", tower=str(TOWER), progress=interrupt)
    assert not list((tmp_path / "run").iterdir())
    import_checkpoint(source, save=tmp_path / "run", tower=str(TOWER))
    with pytest.raises(Interrupted):
        export_checkpoint(tmp_path / "run", save=tmp_path / "out", layout="original", progress=interrupt)
    assert not (tmp_path / "out").exists()


def test_existing_folder_is_not_overwritten(tmp_path):
    source = write_folder(tmp_path / "source", original_state("llama", "dense"), original_config("llama", "dense"))
    import_checkpoint(source, save=tmp_path / "run", tower=str(TOWER))
    with pytest.raises(ConfigError, match="already exists"):
        import_checkpoint(source, save=tmp_path / "run", tower=str(TOWER))


def test_large_tensors_are_stored_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(writers, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(writers, "SHARD_BYTES", 200_000)
    state, config = original_state("llama", "moe"), original_config("llama", "moe")
    source = write_folder(tmp_path / "source", state, config)
    import_checkpoint(source, save=tmp_path / "run", tower=str(TOWER))
    opened = open_checkpoint(tmp_path / "run").tensors
    embedding = opened["language_model.embedding.word_embeddings.weight"]
    assert len(embedding.tiles) > 10 and len(list((tmp_path / "run/iter_0000000").glob("*.distcp"))) > 3
    assert torch.equal(read(embedding), state["model.embed_tokens.weight"])
    export_checkpoint(tmp_path / "run", save=tmp_path / "out", layout="original")
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())["weight_map"]
    assert index.keys() == state.keys()
    for file in set(index.values()):
        for name, value in load_file(tmp_path / "out" / file).items():
            assert torch.equal(value, state[name])
