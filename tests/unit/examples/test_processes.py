"""How many processes `make quickstart` starts: never more than GPUs or cores, nor than the two rows of a step."""

import os
import re
import shutil
import subprocess

import pytest

from tests.helpers.paths import REPO


@pytest.mark.parametrize(
    ("visible", "gpus", "cores", "processes"),
    [
        ("", 1, 2, 2),  # hidden
        ("0", 8, 2, 1),
        ("2,3", 8, 1, 2),
        ("0,1,2,3", 8, 2, 2),
        (None, 1, 2, 1),
        (None, 8, 1, 2),
        (None, 0, 1, 1),
        (None, 0, 64, 2),
    ],
)
def test_the_quickstart_starts_no_process_without_a_device(visible, gpus, cores, processes, tmp_path):
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    for name, text in (
        ("nvidia-smi", "\n".join(f"GPU {number}: H100" for number in range(gpus))),
        ("nproc", str(cores)),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\nprintf '%s\\n' '{text}'\n")
        (tmp_path / name).chmod(0o755)
    environment = {
        name: value for name, value in os.environ.items() if name not in ("CUDA_VISIBLE_DEVICES", "PROCESSES")
    }
    environment |= {"PATH": f"{tmp_path}:{os.environ['PATH']}"} | (
        {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    )
    command = ["make", "--dry-run", "quickstart", f"VENV={tmp_path}"]
    shown = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, check=True).stdout
    assert re.search(r"--nproc-per-node (\d+)", shown)[1] == str(processes)
