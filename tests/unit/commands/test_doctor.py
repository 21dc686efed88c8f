"""`moellava doctor` as a user gives it: the page, JSON, the exit code, and how long it takes."""

import json
import subprocess
import sys

from tests.helpers.paths import REPO


def doctor(*words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "megatron_moellava", "doctor", "--device", "cpu", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=REPO, timeout=120)


def test_the_page_and_the_data_say_the_same(tmp_path):
    found = doctor("--folder", str(tmp_path))
    data = json.loads(doctor("--folder", str(tmp_path), "--json").stdout)
    assert found.returncode == 0, found.stdout + found.stderr
    assert found.stdout.splitlines()[-1] == "no problem found: runs work here"
    assert data["works"] is True
    parts = [finding["part"] for finding in data["findings"]]
    assert list(dict.fromkeys(parts))[:4] == ["machine", "folder", "versions", "compute"]
    assert all(finding["name"] in found.stdout for finding in data["findings"])
    assert "Traceback" not in found.stderr


def test_a_folder_that_cannot_be_written_to_fails(tmp_path):
    found = doctor("--folder", "/proc")
    assert found.returncode == 2
    assert "! writing" in found.stdout and "1 problem(s): writing" in found.stdout
