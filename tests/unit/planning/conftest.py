"""A plan that several tests look at."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.paths import REPO


@pytest.fixture(scope="session")
def planned(tmp_path_factory) -> tuple[str, dict, Path, int]:
    """(text, JSON, picture, peak bytes) of the command on full-size phi-2 with a dry run of two pipeline stages."""
    folder = tmp_path_factory.mktemp("plan")
    command = [sys.executable, "tools/plan.py", "--backbone", "phi-2", "--stage", "3", "--gpus", "8", "--dry-run"]
    command += ["--picture", str(folder / "plan.png"), "--json", str(folder / "plan.json")]
    command += [
        "parallel.pipeline_model_parallel_size=2",
        "parallel.expert_model_parallel_size=4",
        "moe.num_moe_experts=8",
    ]
    with (folder / "out").open("w") as out, (folder / "errors").open("w") as errors:
        process = subprocess.Popen(command, stdout=out, stderr=errors, cwd=REPO)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, (folder / "errors").read_text()[-3000:]
    data = json.loads((folder / "plan.json").read_text())
    return (folder / "out").read_text(), data, folder / "plan.png", usage.ru_maxrss * 1024
