"""Import, train, export: what the imported folder said of its model is still known after a stage of training."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_moellava.conversion.exports import export_checkpoint
from megatron_moellava.conversion.imports import import_checkpoint
from megatron_moellava.conversion.megatron_checkpoint import open_checkpoint
from tests.helpers import data_files
from tests.helpers.conversion_models import TOWER, original_config, original_state, write_folder
from tests.helpers.paths import REPO


def train_two_steps(tmp_path: Path, tokenizer: Path) -> None:
    rows = data_files.make_set(tmp_path / "rows", 20)
    command = [sys.executable, str(REPO / "tools/train.py"), "--stage", "2", "--load", str(tmp_path / "start")]
    command += ["--save", str(tmp_path / "trained"), "--data", str(rows), "--image-folder", str(rows.parent)]
    command += [f"data.tokenizer={tokenizer}", "data.seq_length=512", "data.num_workers=0", "training.train_steps=2"]
    command += ["training.global_batch_size=1", "training.precision=fp32", "logging.tensorboard=false"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, cwd=REPO, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("layer", [-2, -1])
def test_original_config_survives_training(tmp_path, layer):
    """With a feature layer that is not the tower's own, and a key that only the source has."""
    config = original_config("llama", "dense") | {"mm_vision_select_layer": layer}
    config["attention_bias_note"] = None  # tolerated, since it says nothing, and kept
    config["vocab_size"] = 384
    state = original_state("llama", "dense")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):  # as many rows as the tokenizer needs
        state[name] = state[name].repeat(384 // len(state[name]), 1)
    source = write_folder(tmp_path / "source", state, config)
    (source / "generation_config.json").write_text('{"temperature": 0.9}')
    import_checkpoint(source, save=tmp_path / "start", tower=str(TOWER), dtype="float32")
    train_two_steps(tmp_path, data_files.ASSETS / "tok_spm")
    trained = open_checkpoint(tmp_path / "trained")
    assert trained.run.iteration == 2
    assert trained.model.tower.feature_layer == layer
    assert trained.run.provenance["operation"] == "training of stage 2"
    assert trained.run.provenance["parent"]["operation"] == "import"
    export_checkpoint(tmp_path / "trained", save=tmp_path / "out", layout="original")
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert json.loads((tmp_path / "out/generation_config.json").read_text())["temperature"] == 0.9
    differs = {key for key in config.keys() | written.keys() if config.get(key) != written.get(key)}
    assert differs <= {"dtype", "torch_dtype"}, {key: (config.get(key), written.get(key)) for key in differs}
