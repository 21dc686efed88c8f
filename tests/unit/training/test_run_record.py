"""What a tracker is told of a run: where its code stood, what it costs, what it runs on."""

import subprocess

import torch

from megatron_moellava.backbones import get_backbone
from megatron_moellava.towers import get_tower
from megatron_moellava.training.run_record import git_state, run_record
from tests.helpers.runs import tiny


def git(folder, *words):
    subprocess.run(
        ["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=folder, check=True, capture_output=True
    )


def test_git_state_names_commit_branch_and_changed_files(tmp_path):
    assert git_state(tmp_path / "missing") is None
    git(tmp_path, "init", "-b", "trunk")
    (tmp_path / "a.py").write_text("1")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    (tmp_path / "new.py").write_text("not part of any commit")
    state = git_state(tmp_path)
    assert state["branch"] == "trunk" and len(state["commit"]) == 40 and state["changed"] == []
    (tmp_path / "a.py").write_text("2")
    assert git_state(tmp_path)["changed"] == ["a.py"]


def test_a_record_has_settings_costs_and_environment():
    record = run_record(tiny(), get_backbone("llama-tiny"), get_tower("clip-tiny"))
    assert record["run"]["model"]["backbone"] == "llama-tiny"
    costs = record["costs"]
    assert costs["parameters"] == sum(costs["parameters_by_role"].values()) > costs["activated_parameters"] > 0
    assert costs["forward_flops_per_token"] > 0
    assert record["environment"]["packages"]["torch"] == torch.__version__.partition("+")[0]
    assert record["environment"]["processes"] == 1
