"""Fixtures of the cluster tests: one SLURM for the session, one folder with data, and the users' own scripts."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cluster.local_slurm import LocalSlurm, missing
from tests.helpers.paths import REPO

ASSETS = REPO / "tests/golden/assets"

# A tiny model on CPUs instead of the recipe's sizes. Everything else is the recipe, the scripts are the users'.
TINY = (
    "training.device=cpu",
    "training.precision=fp32",
    "training.micro_batch_size=2",
    "training.global_batch_size=8",
    "data.seq_length=128",
    "data.num_workers=0",
    "checkpoint.save_interval=5",
)


@dataclass(frozen=True)
class Cluster:
    slurm: LocalSlurm
    folder: Path

    def submit(self, script: str, *overrides: str, name: str, options: tuple[str, ...] = (), **variables: str) -> str:
        """`sbatch examples/SCRIPT` from the repo's root, as a user would; returns the job id."""
        log = self.folder / f"{name}.log"
        command = ["sbatch", "--parsable", f"--output={log}", *options, f"examples/{script}", *TINY, *overrides]
        return self.slurm.run(*command, cwd=REPO, env=self.environment(name, **variables)).stdout.strip()

    def environment(self, name: str, **variables: str) -> dict[str, str]:
        settings = {
            "PYTHON": sys.executable,
            "PYTHONPATH": str(REPO),
            "OMP_NUM_THREADS": "1",
            "BACKBONE": "phi-2-tiny",
            "TOWER": "clip-tiny",
            "RUNS": str(self.folder / name),
            "DATA": str(self.folder / "rows.json"),
            "IMAGES": str(ASSETS / "images"),
            "MODELS": str(self.folder / "models"),
            "TOKENIZER": str(self.folder / "models/phi-2-tiny"),
            "LOAD": str(self.folder / "base"),
        }
        return {**self.slurm.environment, **settings, **variables}

    def log(self, name: str) -> str:
        path = self.folder / f"{name}.log"
        return path.read_text() if path.exists() else ""

    def newest_step(self, save: Path) -> int:
        file = save / "latest_checkpointed_iteration.txt"
        return int(file.read_text()) if file.exists() else 0

    def wait_for_step(self, save: Path, step: int, seconds: float = 120) -> None:
        self.slurm.wait_until(lambda: self.newest_step(save) >= step, seconds, f"checkpoint {step} in {save}")

    def steps(self, save: Path) -> list[dict]:
        """The log of training steps, one record a step, over all attempts."""
        return [json.loads(line) for line in (save / "steps.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    if missing() or os.geteuid() != 0:
        pytest.fail(f"needs root and {missing() or 'nothing else'}: python tests/cluster/local_slurm.py --install")
    folder = tmp_path_factory.mktemp("cluster")
    write_data(folder)
    write_models(folder / "models")
    convert = [sys.executable, "tools/convert.py", "import", str(folder / "models/phi-2-tiny")]
    convert += ["--tower", str(folder / "models/clip-tiny"), "--save", str(folder / "base")]
    subprocess.run(convert, check=True, cwd=REPO, env={**os.environ, "PYTHONPATH": str(REPO)})
    slurm = LocalSlurm(folder / "slurm")
    try:
        slurm.start()
        yield Cluster(slurm, folder)
    finally:
        slurm.stop()


def write_data(folder: Path) -> None:
    images = sorted(path.name for path in (ASSETS / "images").iterdir())
    rows = [
        {
            "id": str(row),
            "image": images[row % len(images)],
            "conversations": [
                {"from": "human", "value": "<image>\nWhat is this?"},
                {"from": "gpt", "value": f"A picture, number {row}."},
            ],
        }
        for row in range(256)
    ]
    (folder / "rows.json").write_text(json.dumps(rows))


def write_models(folder: Path) -> None:
    """A language model and a tower with random weights, in the folders where a user has the published ones."""
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel, PhiConfig, PhiForCausalLM

    from megatron_moellava.backbones import get_backbone
    from megatron_moellava.towers import get_tower

    backbone, tower = get_backbone("phi-2-tiny"), get_tower("clip-tiny")
    phi = PhiConfig(
        vocab_size=backbone.vocab_size,
        hidden_size=backbone.hidden_size,
        intermediate_size=backbone.ffn_hidden_size,
        num_hidden_layers=backbone.num_layers,
        num_attention_heads=backbone.num_attention_heads,
        partial_rotary_factor=backbone.rotary_percent,
        max_position_embeddings=backbone.max_position_embeddings,
        resid_pdrop=0.0,
    )
    clip = CLIPVisionConfig(
        hidden_size=tower.hidden_size,
        intermediate_size=tower.ffn_hidden_size,
        num_hidden_layers=tower.num_layers,
        num_attention_heads=tower.num_attention_heads,
        image_size=tower.image_size,
        patch_size=tower.patch_size,
        hidden_act=tower.activation,
    )
    torch.manual_seed(0)
    PhiForCausalLM(phi).save_pretrained(folder / backbone.name)
    shutil.copytree(ASSETS / "tok_bpe", folder / backbone.name, dirs_exist_ok=True)
    CLIPVisionModel(clip).save_pretrained(folder / tower.name)
    shutil.copy(ASSETS / "openai/clip-tiny/preprocessor_config.json", folder / tower.name)
