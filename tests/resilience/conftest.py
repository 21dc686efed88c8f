"""Undisturbed runs to compare with, and disks that can be filled."""

import os
import subprocess
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest

from tests.helpers import data_files
from tests.resilience.training import GLOBAL_BATCH, STEPS, records, run, settings


@pytest.fixture(scope="session")
def rows(tmp_path_factory) -> Path:
    """One epoch of the run, to the row."""
    return data_files.make_set(tmp_path_factory.mktemp("rows"), STEPS * GLOBAL_BATCH)


@pytest.fixture(scope="session")
def reference(rows, tmp_path_factory):
    """The folder of an undisturbed run with these settings, made once."""
    made: dict[str, Path] = {}

    def get(world: int, **changes) -> Path:
        key = f"{world} {sorted(changes.items())}"
        if key not in made:
            save = tmp_path_factory.mktemp("reference") / "save"
            job = run(settings(rows, save, **changes), world)
            assert set(job.codes.values()) == {0}, job.log()
            ids = [name for step in records(save) for name in step["sample_ids"]]
            assert sorted(ids) == sorted(f"id{row}" for row in range(STEPS * GLOBAL_BATCH)), (
                "an epoch has each row once"
            )
            made[key] = save
        return made[key]

    return get


@pytest.fixture
def disk(tmp_path):
    """`disk(size)`: a file system of its own, of that size; `disk(size)` again resizes it. Needs root."""
    folder = tmp_path / "disk"

    def mount(size: str) -> Path:
        options = f"remount,size={size}" if folder.exists() else f"size={size}"
        folder.mkdir(exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)
        return folder

    if os.geteuid() != 0:
        pytest.fail("mounting a small disk needs root")
    yield mount
    if folder.exists():
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
