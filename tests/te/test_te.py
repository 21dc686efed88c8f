"""A model of Transformer Engine's modules has the checkpoint of a model of local modules: `make test-te`.

Without a GPU: the modules are really built, on the CPU, and their state is listed, saved and loaded (describe.py,
exchange.py say how). Each mode runs in a process of its own, since the package chooses its modules when it is imported.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.te.describe import cases
from tests.te.exchange import pairs

HERE = Path(__file__).parent


def run(*arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=HERE)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="session")
def described(tmp_path_factory) -> dict[str, dict]:
    folder = tmp_path_factory.mktemp("described")
    for mode in ("local", "te"):
        run("describe.py", mode, str(folder / mode))
    return {mode: json.loads((folder / mode).read_text()) for mode in ("local", "te")}


@pytest.mark.parametrize("case", cases())
def test_keys_shapes_places_and_roles_are_those_of_the_local_modules(described, case):
    local, te = described["local"][case], described["te"][case]
    assert te == local


def test_grouped_and_sequential_experts_have_one_checkpoint(described):
    for mode, found in described.items():
        for case in found:
            if ", grouped" in case and "refused" not in found[case]:
                other = found[case.replace("grouped", "sequential")]
                assert "refused" in other or found[case].keys() == other.keys(), (mode, case)


def test_only_megatron_cores_own_rules_refuse_a_case(described):
    rules = ("num_moe_experts must be non None", "bias is not supported in the shared", "only supported when ETP==1")
    refused = {case: found["refused"] for case, found in described["te"].items() if "refused" in found}
    assert all(message.startswith(rules) or rules[2] in message for message in refused.values()), refused
    assert len(refused) < len(described["te"]) / 5


@pytest.fixture(scope="session", params=[("local", "te"), ("te", "local")], ids="{0[0]} to {0[1]}".format)
def exchanged(request, tmp_path_factory) -> dict[str, list]:
    writer, reader = request.param
    folder = tmp_path_factory.mktemp("checkpoints")
    run("exchange.py", writer, "save", str(folder))
    return json.loads(run("exchange.py", reader, "load", str(folder)).splitlines()[-1])


@pytest.mark.parametrize("pair", pairs(), ids=", ".join)
def test_a_checkpoint_of_one_kind_fills_the_other(exchanged, pair):
    assert exchanged[", ".join(pair)] == []
