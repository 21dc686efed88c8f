"""The engine: rows are ordered as Megatron has them, every tensor is accounted for, files are complete or absent."""

import json
import pickle
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from megatron_moellava.config import CheckpointError, ConfigError
from megatron_moellava.conversion import writers
from megatron_moellava.conversion.exports import export_checkpoint
from megatron_moellava.conversion.imports import import_checkpoint
from megatron_moellava.conversion.megatron_checkpoint import open_checkpoint
from megatron_moellava.conversion.readers import open_bin, open_huggingface, open_megatron
from megatron_moellava.conversion.recipes import Part, Recipe, check
from megatron_moellava.conversion.tensors import BLOCK, Files, Tensor, Tile
from megatron_moellava.conversion.torch_file import frame
from megatron_moellava.mapping import QKV, Concat, FusedQKV, Heads
from tests.helpers.conversion_models import TOWER, original_config, original_state, write_folder

GROUPED = Heads(num_attention_heads=4, num_query_groups=2, kv_channels=1)


def joined(mapping, num_rows: int, *sources: list[str]) -> list[str]:
    return [
        sources[piece.source][piece.start + row]
        for piece in mapping.pieces(num_rows, GROUPED)
        for row in range(piece.rows)
    ]


def test_qkv_rows_are_interleaved_by_query_group():
    rows = joined(QKV("m", ("q", "k", "v")), 8, ["q0", "q1", "q2", "q3"], ["k0", "k1"], ["v0", "v1"])
    assert rows == ["q0", "q1", "k0", "v0", "q2", "q3", "k1", "v1"]


def test_fused_qkv_gives_the_same_order():
    rows = joined(FusedQKV("m", ("qkv",)), 8, ["q0", "q1", "q2", "q3", "k0", "k1", "v0", "v1"])
    assert rows == ["q0", "q1", "k0", "v0", "q2", "q3", "k1", "v1"]


def test_gate_stands_above_up():
    assert joined(Concat("m", ("gate", "up")), 4, ["g0", "g1"], ["u0", "u1"]) == ["g0", "g1", "u0", "u1"]


def read(tensor: Tensor) -> torch.Tensor:
    with Files() as files:
        content = b"".join(bytes(block) for block in files.blocks(tensor, 0, tensor.numel))
    return torch.frombuffer(bytearray(content), dtype=getattr(torch, tensor.dtype)).view(tensor.shape)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int64", "bool"])
@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 3, 4), (1, 1, 7)])
def test_framed_bytes_are_a_file_of_torch_save(tmp_path, shape, dtype):
    tensor = torch.randn(shape).to(getattr(torch, dtype))
    content = bytes(tensor.reshape(-1).view(torch.uint8).numpy())
    head, tail = frame(shape, dtype, tensor.numel(), len(content))
    (tmp_path / "file").write_bytes(head + content + tail)
    assert torch.equal(torch.load(tmp_path / "file", weights_only=True), tensor)


def test_tensor_cut_by_columns_is_put_together(tmp_path):
    """Row-parallel weights are stored as shards that are narrower than the tensor."""
    whole = torch.arange(6 * 10, dtype=torch.float32).view(6, 10)
    left, right = whole[:, :4].contiguous(), whole[:, 4:].contiguous()
    (tmp_path / "left").write_bytes(left.numpy().tobytes())
    (tmp_path / "right").write_bytes(right.numpy().tobytes())
    tiles = (
        Tile(str(tmp_path / "left"), 0, (0, 6), (0, 4)),
        Tile(str(tmp_path / "right"), 0, (0, 6), (4, 10)),
    )
    assert torch.equal(read(Tensor((6, 10), "float32", tiles)), whole)


def test_tensors_larger_than_a_block_stream_through(tmp_path):
    state = {"big": torch.arange(BLOCK // 2 + 3, dtype=torch.int32)}
    torch.save(state, tmp_path / "big.bin")
    assert torch.equal(read(open_bin(tmp_path / "big.bin")["big"]), state["big"])


def recipes_and_tensors():
    tensors = {name: Tensor((2, 3), "float32", make=lambda: torch.zeros(2, 3)) for name in "abc"}
    return [Recipe(name.upper(), (2, 3), "float32", (Part(name, 0, 6),)) for name in "abc"], tensors


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda r, t: t.pop("b"), "b: missing"),
        (lambda r, t: t.update(d=t["a"]), "d .*nothing uses it"),
        (lambda r, t: r.append(Recipe("D", (2, 3), "float32", (Part("a", 0, 6),))), "a: elements .* used twice"),
        (lambda r, t: r.append(r[0]), "A: would be produced twice"),
        (lambda r, t: t.update(a=replace(t["a"], shape=(3, 3))), "a: shape .*3, 3"),
        (lambda r, t: t.update(a=Tensor((2, 3), "float32", ())), "a: 6 of its 6 elements are in no file"),
        (lambda r, t: r.__setitem__(0, Recipe("A", (1, 3), "float32", (Part("a", 0, 3),))), "a: only 3 of 6"),
    ],
)
def test_check_names_what_is_lost_doubled_or_misshapen(spoil, message):
    recipes, tensors = recipes_and_tensors()
    check(recipes, tensors, what="x", expected=dict.fromkeys("abc", (2, 3)))
    spoil(recipes, tensors)
    with pytest.raises(CheckpointError, match=message):
        check(recipes, tensors, what="x", expected=dict.fromkeys("abc", (2, 3)))


def test_all_problems_of_a_source_are_in_one_error(tmp_path):
    state = original_state("llama", "dense")
    del state["model.layers.1.mlp.up_proj.weight"]
    state["model.layers.9.extra"] = torch.zeros(2)
    state["model.norm.weight"] = torch.zeros(3)
    source = write_folder(tmp_path / "source", state, original_config("llama", "dense"))
    with pytest.raises(CheckpointError) as error:
        import_checkpoint(source, save=tmp_path / "run", tower=str(TOWER))
    for part in ("up_proj.weight: missing", "layers.9.extra", "model.norm.weight: shape [3], expected [128]"):
        assert part in str(error.value)
    assert not (tmp_path / "run").exists()


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


def test_truncated_safetensors_is_an_error(tmp_path):
    source = write_folder(tmp_path / "source", original_state("llama", "dense"), original_config("llama", "dense"))
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated"):
        open_huggingface(source)


def test_missing_shard_of_an_index_is_named(tmp_path):
    state, config = original_state("llama", "dense"), original_config("llama", "dense")
    source = write_folder(tmp_path / "source", state, config, "sharded")
    (source / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model-00002-of-00002"):
        open_huggingface(source)


def test_bin_with_code_in_it_does_not_run(tmp_path):
    class Harmful:
        def __reduce__(self):
            return (print, ("run",))

    torch.save({"a": Harmful()}, tmp_path / "bad.bin")
    with pytest.raises(CheckpointError, match="not a plain dictionary"):
        open_bin(tmp_path / "bad.bin")
    (tmp_path / "old.bin").write_bytes(pickle.dumps({}))
    with pytest.raises(CheckpointError, match="not a plain dictionary"):
        open_bin(tmp_path / "old.bin")


def test_bin_tensors_that_share_storage_are_read(tmp_path):
    base = torch.randn(6, 4)
    state = {"whole": base, "rows": base[2:4], "tied": base, "alone": torch.randn(3)}
    torch.save(state, tmp_path / "shared.bin")
    opened = open_bin(tmp_path / "shared.bin")
    assert all(torch.equal(read(opened[name]), value) for name, value in state.items())
    torch.save({"columns": base[:, 1:3]}, tmp_path / "view.bin")
    with pytest.raises(CheckpointError, match="contiguous"):
        open_bin(tmp_path / "view.bin")


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


def test_incomplete_megatron_checkpoint_is_an_error(tmp_path):
    source = write_folder(tmp_path / "source", original_state("llama", "dense"), original_config("llama", "dense"))
    import_checkpoint(source, save=tmp_path / "run", tower=str(TOWER))
    iteration = tmp_path / "run/iter_0000000"
    (iteration / "__0_0.distcp").unlink()
    with pytest.raises(CheckpointError, match="missing"):
        open_megatron(iteration)
    (iteration / "run.json").unlink()
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        open_checkpoint(tmp_path / "run")
