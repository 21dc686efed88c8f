"""make test-gpu, make bench-gpu and their page, on a machine without a GPU."""

import os
import subprocess
import sys

import pytest

from benchmarks.gpu import PAGE, PARTS, page
from tests.helpers.paths import REPO


@pytest.mark.parametrize("what", PARTS)
def test_without_a_gpu_one_line_says_what_would_be_done(what):
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPO)}
    command = [sys.executable, "-m", "benchmarks.gpu", what]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPO, env=environment)
    assert done.returncode == 2
    assert len(done.stdout.splitlines()) == 1
    assert all(name in done.stdout for name in PARTS[what])


def test_the_page_says_what_has_not_been_measured():
    text = page(
        {"golden": {"result": {"tables": ["311 quantities compared, 0 failed"]}}, "moe_layer": {"error": "no memory"}}
    )
    assert text.count("not measured yet") == 4
    assert "311 quantities" in text and "no memory" in text


def test_the_page_without_results_is_the_committed_one():
    if "not measured yet" in PAGE.read_text() and "```json" not in PAGE.read_text():
        assert PAGE.read_text() == page({}), "python -m benchmarks.gpu page"
