"""tools/verify.py on the recordings of tests/golden: everything agrees, and a single wrong number is seen."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_moellava.commands.verify import main
from megatron_moellava.verify.folder import Folder
from megatron_moellava.verify.gates import verify_gates
from megatron_moellava.verify.table import Table
from tests.helpers.golden_folder import GOLDEN, unpack
from tests.helpers.paths import REPO


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The llama recordings with ordinary checkpoints. Tests copy it before they change a number."""
    return unpack(tmp_path_factory.mktemp("golden"))


def run_verify(folder, *overrides, processes=1):
    start = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone"] if processes > 1 else []
    environment = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *start, str(REPO / "tools/verify.py"), str(folder), *overrides]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)


def failures(result) -> str:
    return "\n".join(line for line in result.stdout.splitlines() if "FAIL" in line) or result.stderr[-3000:]


@pytest.fixture
def verified(capsys):
    """The command in this process, which has imported everything: (exit code, what it printed, its errors)."""

    def run(folder) -> tuple[int, str, str]:
        code = main([str(folder)])
        return code, *capsys.readouterr()

    return run


@pytest.mark.parametrize(
    "layout",
    [
        {},
        {"tensor_model_parallel_size": 2},
        {"pipeline_model_parallel_size": 2},
        {"expert_model_parallel_size": 2},
    ],
    ids=lambda layout: next(iter(layout), "one process"),
)
def test_everything_agrees_with_the_original_under_every_layout(whole, layout):
    overrides = [f"parallel.{name}={value}" for name, value in layout.items()]
    result = run_verify(whole, *overrides, processes=2 if layout else 1)
    assert result.returncode == 0, failures(result)
    for case in (
        "gate ",
        "conversations v1",
        "sampler only_text",
        "scorers textvqa",
        "dense train/",
        "moe train_drop_det/",
        "generation ",
        "curve stage3_drop",
    ):
        assert case in result.stdout, f"{case} did not run"


def copy_of(whole, tmp_path):
    """The folder again, with links instead of files, so that one can be replaced."""
    for source in whole.parent.rglob("*"):
        target = tmp_path / source.relative_to(whole.parent)
        if source.is_dir():
            target.mkdir(parents=True, exist_ok=True)
        else:
            target.symlink_to(source)
    return tmp_path / "llama"


def replace_file(file, change):
    """Load, change in place, save; the link goes, what it pointed to stays."""
    if file.suffix == ".safetensors":
        content, save = load_file(file), save_file
    else:
        content, save = torch.load(file, weights_only=True), torch.save
    change(content)
    file.unlink()
    save(content, file)


def only(folder, *kept):
    """Leave nothing but these recordings and what they need."""
    for file in folder.iterdir():
        if file.suffix in (".pt", ".bin", ".json") and file.name not in (*kept, "inputs.pt"):
            file.unlink()
    for name in ("dense", "moe"):
        if f"{name}.pt" not in kept and not (name == "dense" and "train.pt" in kept):
            for file in (folder / name).iterdir():
                file.unlink()


def nudge_weight(content):
    content["model.layers.1.mlp.up_proj.weight"][3, 5] += 0.05


def nudge_logit(content):
    content["eval/single"]["logits"][0, 4, 7] += 2e-4


def nudge_gradient(content):
    content["train/multi_img"]["grads"]["model.layers.0.self_attn.k_proj.weight"][0, 0] += 1e-3


def nudge_gate_weight(content):
    gates = content["train_recipe/img_text"]["gates"]
    next(iter(gates.values()))["weights"][11, 2] += 1e-4


def nudge_curve(content):
    content["stage1"]["hist"][4]["loss"] += 3e-4


@pytest.mark.parametrize(
    "file, change, kept, seen",
    [
        ("dense/model.safetensors", nudge_weight, "dense.pt", "logits"),
        ("dense.pt", nudge_logit, "dense.pt", "logits"),
        ("dense.pt", nudge_gradient, "dense.pt", "gradients"),
        ("moe.pt", nudge_gate_weight, "moe.pt", "weights"),
        ("train.pt", nudge_curve, "train.pt", "loss"),
    ],
    ids=["weight", "logit", "gradient", "gate weight", "curve"],
)
def test_one_wrong_number_is_seen(whole, verified, tmp_path, file, change, kept, seen):
    folder = copy_of(whole, tmp_path)
    only(folder, kept)
    replace_file(folder / file, change)
    code, printed, errors = verified(folder)
    assert code == 1, printed + errors
    assert any("FAIL" in line and f" {seen} " in line for line in printed.splitlines()), printed


@pytest.mark.parametrize("backbone", ["phi", "llama"])
def test_gates_alone_agree(backbone):
    table = Table()
    verify_gates(Folder(GOLDEN / backbone), table)
    assert len(table.rows) > 100 and table.passes, table.render()


def test_a_wrong_token_of_a_conversation_is_seen(whole, verified, tmp_path):
    folder = copy_of(whole, tmp_path)
    only(folder, "moe_layers.json")
    file = folder.parent / "data/conversations.json"
    content = json.loads(file.read_text())
    content["versions"]["v1"]["one_image"]["labels"][-1] = -100
    file.unlink()
    file.write_text(json.dumps(content))
    code, printed, _ = verified(folder)
    assert code == 1
    assert "one_image" in next(line for line in printed.splitlines() if "FAIL" in line)


def test_a_folder_without_recordings_is_refused(verified, tmp_path):
    code, _, errors = verified(tmp_path)
    assert code == 2 and "holds no recordings" in errors
