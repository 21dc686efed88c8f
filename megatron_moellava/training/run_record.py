"""What a tracker is told of a run besides its numbers: settings, git state, costs and environment."""

import os
import platform as python_platform
import subprocess
import sys
from pathlib import Path

import torch.distributed as dist

import megatron_moellava
from megatron_moellava import platform
from megatron_moellava.backbones import Backbone
from megatron_moellava.config import RunConfig, to_dict
from megatron_moellava.costs.parameters import activated_parameters, token_flops, whole_parameters
from megatron_moellava.costs.shapes import Model, model_of_run
from megatron_moellava.machine import installed_version
from megatron_moellava.towers import Tower

PACKAGES = ("torch", "megatron-core", "transformers", "transformer-engine", "megatron-energon", "numpy")


def run_record(run: RunConfig, backbone: Backbone, tower: Tower) -> dict:
    """Plain data: {"run", "git", "costs", "environment"}. `git` is None where the package lies in no repository."""
    return {
        "run": to_dict(run),
        "git": git_state(Path(megatron_moellava.__file__).parent),
        "costs": costs(model_of_run(run, backbone, tower)),
        "environment": environment(),
    }


def costs(model: Model) -> dict:
    """Parameters by role, of the whole model and of those that a token meets, and FLOPs of a token's forward pass."""
    whole, activated = whole_parameters(model), activated_parameters(model)
    return {
        "parameters": sum(whole.values()),
        "parameters_by_role": dict(whole),
        "activated_parameters": sum(activated.values()),
        "forward_flops_per_token": token_flops(model),
    }


def environment() -> dict:
    """Versions, and what the run computes on."""
    return {
        "megatron_moellava": megatron_moellava.__version__,
        "python": python_platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := installed_version(name))},
        "host": os.uname().nodename,
        "processes": dist.get_world_size() if dist.is_initialized() else 1,
        "device": platform.device_name() or "CPU",
        "command": sys.argv,
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
    }


def git_state(folder: Path) -> dict | None:
    """{"commit", "branch", "changed": files that differ from it} of the repository that a folder lies in."""
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    changed = (_git(folder, "status", "--porcelain", "--untracked-files=no") or "").splitlines()
    branch = _git(folder, "rev-parse", "--abbrev-ref", "HEAD")
    return {"commit": commit, "branch": branch, "changed": [line[2:].strip() for line in changed]}


def _git(folder: Path, *words: str) -> str | None:
    try:
        found = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.rstrip("\n") if found.returncode == 0 else None
