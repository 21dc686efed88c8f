"""A plan that several tests look at."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.paths import REPO

# A child's ru_maxrss begins with what the process that started it held: the kernel keeps it over exec. VmHWM begins anew.
WITH_PEAK = """
import atexit, runpy, sys
from pathlib import Path
status, *sys.argv = sys.argv[1:]
atexit.register(lambda: Path(status).write_text(Path("/proc/self/status").read_text()))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="session")
def planned(tmp_path_factory) -> tuple[str, dict, Path, int]:
    """(text, JSON, picture, peak bytes) of the command on full-size phi-2 with a dry run of two pipeline stages."""
    folder = tmp_path_factory.mktemp("plan")
    options = ["--backbone", "phi-2", "--stage", "3", "--gpus", "8", "--dry-run"]
    command = [sys.executable, "-c", WITH_PEAK, str(folder / "status"), "tools/plan.py", *options]
    command += ["--picture", str(folder / "plan.png"), "--json", str(folder / "plan.json")]
    command += [
        "parallel.pipeline_model_parallel_size=2",
        "parallel.expert_model_parallel_size=4",
        "moe.num_moe_experts=8",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPO)
    assert done.returncode == 0, done.stderr[-3000:]
    (kilobytes,) = re.findall(r"VmHWM:\s+(\d+) kB", (folder / "status").read_text())
    data = json.loads((folder / "plan.json").read_text())
    return done.stdout, data, folder / "plan.png", int(kilobytes) * 1024
