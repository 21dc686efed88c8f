"""The program's GPU path on a pretended GPU: what it computes is what a plain CPU run computes, and how often it waits.

Kernels, Transformer Engine and speed are not covered: nothing here has run on a GPU.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu.job import JOBS
from tests.helpers.paths import REPO

TABLE = Path(__file__).with_name("host_waits.json")
CORE = ("packed", "original", "megatron answers", "original answers", "gates", "moved")
WHOLE = os.environ.get("PRETENDED_GPU") == "whole"
MORE = [name for name in JOBS if name not in CORE and not name.endswith(" 2")]
LAYOUTS = [name for name in JOBS if name.endswith(" 2")]
# Norms are summed in another order than by megatron-core's stand-in on a CPU; measured 5e-7 of a gradient norm.
TOLERANCE = 5e-6
LOSSY = 2e-2  # of bf16
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHONPATH": str(REPO),
}


def start(*command: str) -> subprocess.CompletedProcess:
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPO, env=ENVIRONMENT, timeout=1500)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def results(request, tmp_path_factory):
    """(where, job) -> numbers; all jobs of one process share its imports."""
    folder = tmp_path_factory.mktemp("pretended")
    asked = {
        item.callspec.params["job"]
        for item in request.session.items
        if "job" in getattr(getattr(item, "callspec", None), "params", {})
    }
    alone, together = sorted(asked - set(LAYOUTS)), sorted(asked & set(LAYOUTS))
    launch = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m")
    for where in ("cpu", "gpu"):
        if alone:
            start(sys.executable, "-m", "tests.gpu.job", where, str(folder / where), *alone)
        for name in together:
            start(*launch, "tests.gpu.job", where, str(folder / where), name)
    return lambda where, job: json.loads((folder / where / f"{job}.json").read_text())


def jobs(*names: str):
    return pytest.mark.parametrize("job", [*names, *(MORE + LAYOUTS if WHOLE else ())])


@jobs(*CORE)
def test_the_gpu_path_computes_what_the_cpu_computes(job, results):
    cpu, gpu = results("cpu", job), results("gpu", job)
    assert "error" not in gpu, gpu["error"]
    assert "error" not in cpu, cpu["error"]
    assert gpu.keys() - {"waits"} == cpu.keys()
    if "steps" not in cpu:
        assert cpu.get("passes", True)  # of verify's comparison
        assert {key: gpu[key] for key in cpu} == cpu
        return
    tolerance = LOSSY if job == "bf16" else TOLERANCE
    for ours, theirs in zip(gpu["steps"], cpu["steps"], strict=True):
        assert ours == pytest.approx(theirs, rel=tolerance)
    assert gpu["resumed"] == gpu["steps"], "a run that goes on from its checkpoint is the run that did not stop"


@jobs(*(name for name in CORE if name not in ("gates", "moved")))
def test_the_host_waits_no_more_often_than_it_did(job, results):
    """Waits inside of steps, by place. The table may only shrink: a wait that is gone must go from it too."""
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    waits = results("gpu", job)["waits"]
    if os.environ.get("WRITE_HOST_WAITS"):
        TABLE.write_text(json.dumps(table | {job: dict(sorted(waits.items()))}, indent=1) + "\n")
        return
    assert job in table, f"{TABLE.name} has no waits of {job}: WRITE_HOST_WAITS=1 writes them"
    assert waits == table[job], f"WRITE_HOST_WAITS=1 writes {TABLE.name}; more waits than before need a reason"


@pytest.fixture(scope="module")
def rules() -> dict:
    return json.loads(start(sys.executable, "-m", "tests.gpu.rules").stdout.splitlines()[-1])


@pytest.mark.parametrize("what", ["mixing", "mixing in place", "mixing in a backward pass"])
def test_tensors_of_two_devices_do_not_mix(what, rules):
    assert rules[what] == "MixedDevices"


@pytest.mark.parametrize(
    "what", ["a number of the host", "an index of the host", "a copy", "a GPU tensor in a collective"]
)
def test_what_cuda_allows_is_allowed(what, rules):
    assert rules[what] == ""


def test_a_planted_cpu_tensor_in_a_collective_is_found(rules):
    assert rules["a CPU tensor in a collective"] == "NoBackend"
    assert rules["a CPU tensor in a gloo group"] == ""


def test_there_is_one_device_and_no_numpy_on_it(rules):
    assert (rules["a second device"], rules["numpy"]) == ("RuntimeError", "TypeError")


def test_tensors_say_where_they_are(rules):
    assert rules["places"] == ["cuda:0", "cuda:0", "cpu", "cuda:0", "cuda:0", "cpu"] and rules["backward"]


def test_waits_of_the_host_are_counted(rules):
    waiting = dict.fromkeys(("item", "bool", "tolist", "to the host", "boolean index", "values to the device"), 1)
    assert rules["waits"] == waiting | {"arithmetic": 0, "the host's own": 0}
