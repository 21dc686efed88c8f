"""Converted checkpoints load into megatron-core under every layout, and what is saved there exports byte for byte."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_moellava.conversion.exports import export_checkpoint
from megatron_moellava.conversion.imports import import_checkpoint
from tests.helpers.conversion_models import (
    TOWER,
    assert_same_bytes,
    original_config,
    original_state,
    residual,
    write_folder,
)
from tests.helpers.paths import REPO

HERE = Path(__file__).parent
LAYOUTS = {
    "tp2": {"tensor_model_parallel_size": 2},
    "pp2": {"pipeline_model_parallel_size": 2},
    "ep2": {"expert_model_parallel_size": 2},
}
MODELS = {"phi": ("phi", "moe"), "llama": ("llama", "moe"), "residual": ("phi", "moe_residual")}
CASES = [("phi", "tp2"), ("phi", "pp2"), ("llama", "tp2"), ("llama", "ep2"), ("residual", "tp2"), ("residual", "ep2")]


def source_state(name: str) -> dict[str, torch.Tensor]:
    """fp32, so that the model's own precision loses nothing."""
    backbone, kind = MODELS[name]
    state = original_state(backbone, "moe")
    state = residual(state) if kind == "moe_residual" else state
    return {key: value.float() for key, value in state.items()}


@pytest.fixture(scope="module")
def resaved(tmp_path_factory) -> Path:
    """Every case, loaded and saved by two processes."""
    folder = tmp_path_factory.mktemp("conversion")
    for name, (backbone, kind) in MODELS.items():
        config = original_config(backbone, kind)
        source = write_folder(folder / name / "source", source_state(name), config)
        import_checkpoint(source, save=folder / name / "run", tower=str(TOWER))
    jobs = [(str(folder / name / "run"), str(folder / name / layout), LAYOUTS[layout]) for name, layout in CASES]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO), "WORLD_SIZE": "2"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHDYNAMO_DISABLE": "1"}
    processes = []
    for rank in range(2):
        command = [sys.executable, str(HERE / "conversion_worker.py"), json.dumps(jobs)]
        log = (folder / f"rank{rank}.log").open("w")
        more = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        processes.append(subprocess.Popen(command, env=environment | more, stdout=log, stderr=subprocess.STDOUT))
    codes = [process.wait(900) for process in processes]
    assert codes == [0, 0], (folder / "rank0.log").read_text()[-3000:]
    return folder


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_import_load_save_export_is_byte_equal(resaved, tmp_path, name, layout):
    export_checkpoint(resaved / name / layout, save=tmp_path / "out", layout="original")
    assert_same_bytes(load_file(tmp_path / "out/model.safetensors"), source_state(name))
