"""tests/golden/llama as a whole folder: its weights are kept compressed, and once where two checkpoints share them.

python -m tests.helpers.golden_folder OUT && python tools/verify.py OUT/llama
"""

import json
import lzma
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.paths import GOLDEN

TOWER = "model.image_tower.image_tower."


def unpack(target: Path) -> Path:
    """A copy of tests/golden with ordinary checkpoints in llama/dense and llama/moe; returns the llama folder."""
    shutil.copytree(GOLDEN, target, dirs_exist_ok=True)
    tower = {
        TOWER + name: tensor for name, tensor in load_file(GOLDEN / "assets/openai/clip-tiny/model.safetensors").items()
    }
    weights = read_weights(GOLDEN / "llama/weights.xz", GOLDEN / "llama/weights.json")
    names = json.loads((GOLDEN / "llama/names.json").read_text())
    for checkpoint in ("dense", "moe"):
        chosen = {name: weights[name] for name in names[f"all_{checkpoint}_names"]}
        save_file(chosen | tower, target / "llama" / checkpoint / "model.safetensors")
    return target / "llama"


def read_weights(file: Path, index: Path) -> dict[str, torch.Tensor]:
    """fp32 tensors whose bytes are sorted by significance, which xz shrinks by a sixth."""
    planes = np.frombuffer(lzma.decompress(file.read_bytes()), np.uint8).reshape(4, -1)
    values = torch.from_numpy(np.ascontiguousarray(planes.T).view(np.float32).reshape(-1))
    tensors, start = {}, 0
    for name, shape in json.loads(index.read_text()).items():
        count = int(np.prod(shape))
        tensors[name] = values[start : start + count].reshape(shape).clone()
        start += count
    return tensors


if __name__ == "__main__":
    print(unpack(Path(sys.argv[1])))
