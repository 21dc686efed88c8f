"""Every family against transformers: import a tiny random model, compare logits, loss and every gradient by name.

One process per layout compares all families (`hf_worker.py`).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers import hf_models, hf_moe_models
from tests.helpers.paths import REPO

BUILDERS = hf_models.BUILDERS | hf_moe_models.BUILDERS
TOWER = REPO / "tests/golden/assets/openai/clip-tiny"
LAYOUTS = {
    "one": [],
    "tp2": ["parallel.tensor_model_parallel_size=2"],
    "pp2": ["parallel.pipeline_model_parallel_size=2"],
    "ep2": ["parallel.expert_model_parallel_size=2"],
    "etp2": ["parallel.tensor_model_parallel_size=2", "parallel.expert_tensor_parallel_size=2"],
}
LOGITS = 1e-4  # absolute, logits of size 4; measured 6e-6
LOSS = 1e-5
GRADIENTS = 1e-5  # of the largest element of each gradient; measured 5e-6


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder per family: weights as transformers saves them, and what transformers computes."""
    folder = tmp_path_factory.mktemp("families")
    for name, build in BUILDERS.items():
        torch.save(build(folder / name), folder / name / "reference.pt")
    return folder


@pytest.fixture(scope="module")
def errors(models):
    """Errors of all families by layout, computed at the first question."""
    known = {}

    def of(layout: str) -> dict:
        if layout not in known:
            known[layout] = run_worker(models, layout)
        return known[layout]

    return of


def run_worker(folder: Path, layout: str) -> dict:
    overrides = LAYOUTS[layout]
    start = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"] if overrides else []
    command = [sys.executable, *start, str(Path(__file__).with_name("hf_worker.py")), str(folder), str(TOWER), layout]
    environment = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    result = subprocess.run([*command, *overrides], capture_output=True, text=True, env=environment, timeout=900)
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads((folder / f"{layout}.json").read_text())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", BUILDERS)
def test_family_equals_transformers(errors, family, layout):
    found = errors(layout)[family]
    assert found["compared"] > 20
    assert found["logits"] < LOGITS, found
    assert found["loss"] < LOSS, found
    assert found["gradients"] < GRADIENTS, found
