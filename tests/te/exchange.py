"""Checkpoints between local modules and Transformer Engine's: one process writes them, another one loads and compares.

  python tests/te/exchange.py local|te save|load FOLDER

`save` writes a checkpoint of every family (random weights); `load` fills models of this mode from them and prints, as
JSON, the tensors whose values are not those of the files.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from tests.te.describe import BLOCKS, backbones, finish_pretending, pretend_gpu


def pairs() -> list[tuple[str, str]]:
    """(backbone, block): every family with grouped experts, one with sequential and shared ones."""
    return [(name, "grouped") for name in backbones()] + [
        ("llama-tiny", block) for block in ("sequential", "shared", "residual", "dense")
    ]


def build(backbone: str, block: str):
    from megatron_moellava import parallel
    from megatron_moellava.config import RunConfig, from_dict
    from megatron_moellava.model.build import build_model

    tree = {"model": {"backbone": backbone, "tower": "clip-tiny"}, "training": {"stage": 3, "precision": "bf16"}}
    run = from_dict(RunConfig, tree | ({"moe": BLOCKS[block]} if BLOCKS[block] else {}))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel.initialize(run.parallel, 1)
    return run, build_model(run)


def save(folder: Path, backbone: str, block: str) -> None:
    from megatron_moellava.training.checkpoint import TrainingState, save_checkpoint

    run, chunks = build(backbone, block)
    with torch.no_grad():
        for parameter in chunks[0].parameters():
            parameter.normal_()
    save_checkpoint(folder, run, chunks, TrainingState(iteration=1, consumed_samples=0, data=None), keep=1)


def load(folder: Path, backbone: str, block: str) -> list[str]:
    """Names of tensors that are not what the file says."""
    from megatron_moellava.checkpoint.folders import require_checkpoint
    from megatron_moellava.model.weights import load_weights, model_state

    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import apply_factories

    _, chunks = build(backbone, block)
    checkpoint = require_checkpoint(folder)
    load_weights(checkpoint, chunks)
    stored = dist_checkpointing.load_plain_tensors(str(checkpoint))
    state = model_state(chunks)
    apply_factories(state)
    wrong, seen = [], set()
    for item in nested_values(state):
        axes = item.prepend_axis_num  # of expert and layer numbers, which the part itself does not have
        sides = zip(item.global_offset[axes:], item.local_shape, strict=True)
        part = (*item.global_offset[:axes], *(slice(offset, offset + size) for offset, size in sides))
        seen.add(item.key)
        if not torch.equal(stored[item.key][part], item.data):
            wrong.append(item.key)
    return wrong + sorted(name for name in stored.keys() - seen if not name.startswith("vision_tower.unused."))


def main() -> None:
    mode, action, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    if mode == "te":
        pretend_gpu()
    from megatron_moellava import parallel

    if mode == "te":
        finish_pretending()
    result = {}
    for backbone, block in pairs():
        name = f"{backbone}, {block}"
        result[name] = (save if action == "save" else load)(folder / name, backbone, block)
        parallel.shutdown()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
