"""`result`: what the job of a test measured. All jobs of all collected tests run in one launch, before the first test.

A test says what it needs by a parameter called `job` (see `plan.py`). With several test processes one launches, the
others wait for it.
"""

import json
from pathlib import Path

import filelock
import pytest

from tests.distributed.launch import launch
from tests.distributed.plan import with_dependencies


@pytest.fixture(scope="session")
def results(request, tmp_path_factory, worker_id) -> Path:
    """The folder of the launch."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "layouts"
    with filelock.FileLock(f"{folder}.lock"):
        if not (folder / "jobs.json").exists():
            asked = [item.callspec.params["job"] for item in request.session.items if _has_job(item)]
            launch(with_dependencies(asked), folder)
    return folder


def _has_job(item) -> bool:
    return "job" in getattr(getattr(item, "callspec", None), "params", {})


@pytest.fixture
def result(results, job) -> dict:
    """The numbers of this test's job; fails with the traceback of the rank that failed first."""
    files = sorted(results.glob(f"{job['id']}.rank*.json"))
    errors = [json.loads(file.read_text())["error"] for file in files]
    file = results / f"{job['id']}.json"
    if not file.exists():
        pytest.fail("\n".join([f"{job['id']} left no result", *errors]))
    numbers = json.loads(file.read_text())
    if "error" in numbers or errors:
        pytest.fail("\n".join([numbers.get("error", ""), *errors]))
    return numbers
