"""Small checkpoints in the released layouts, with the original's names and shapes and random weights."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from megatron_moellava.conversion.tensors import Files, Tensor
from tests.helpers.paths import GOLDEN

TOWER = GOLDEN / "assets/openai/clip-tiny"
TOWER_PREFIX = "model.image_tower.image_tower."


def original_state(backbone: str, kind: str) -> dict[str, torch.Tensor]:
    """All tensors of the original's `backbone` ("phi", "llama") as `kind` ("dense", "moe"), bf16 with fp32 gates.

    Names and shapes are what the original itself printed (names.json); the tower's are those of its file.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = json.loads((GOLDEN / backbone / "names.json").read_text())[f"all_{kind}_names"]
    state = {
        name: torch.randn(shape, generator=generator).to(torch.float32 if ".wg." in name else torch.bfloat16)
        for name, shape in shapes.items()
    }
    return state | {
        TOWER_PREFIX + name: value.bfloat16() for name, value in load_file(TOWER / "model.safetensors").items()
    }


def residual(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A MoE state with what residual MoE adds: the MLP beside the experts, and the coefficient."""
    added, generator = {}, torch.Generator().manual_seed(1)
    for name, value in state.items():
        root, _, tail = name.partition(".mlp.deepspeed_moe.experts.deepspeed_experts.0.")
        if tail:
            added[f"{root}.mlp.mlp.{tail}"] = value + 1
            hidden = state["model.embed_tokens.weight"].shape[1]
            added[f"{root}.mlp.coefficient.weight"] = torch.randn(2, hidden, generator=generator).bfloat16()
            added[f"{root}.mlp.coefficient.bias"] = torch.randn(2, generator=generator).bfloat16()
    return state | added


def write_folder(folder: Path, state: dict[str, torch.Tensor], config: dict, kind: str = "safetensors") -> Path:
    """A folder as a release has it: one safetensors file, two shards with an index, or a .bin."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    if kind == "bin":
        torch.save(state, folder / "pytorch_model.bin")
    elif kind == "sharded":
        names = sorted(state)
        shards = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
        for file, part in shards.items():
            save_file({name: state[name] for name in part}, folder / file)
        index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        save_file(state, folder / "model.safetensors")
    return folder


def original_config(backbone: str, kind: str) -> dict:
    return json.loads((GOLDEN / backbone / kind / "config.json").read_text())


def assert_same_bytes(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        other = right[name]
        assert value.dtype == other.dtype and value.shape == other.shape, name
        assert torch.equal(value.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)), name


def read(tensor: Tensor) -> torch.Tensor:
    with Files() as files:
        content = b"".join(bytes(block) for block in files.blocks(tensor, 0, tensor.numel))
    return torch.frombuffer(bytearray(content), dtype=getattr(torch, tensor.dtype)).view(tensor.shape)
