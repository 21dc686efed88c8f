"""Formulas equal what the dry run counts of full-size models, on every axis. Minutes: make test-planning."""

import json
import subprocess
import sys

import pytest

from tests.helpers.paths import REPO

# A process of its own: a fake process group must not meet the real one of the other tests.
SCRIPT = """
import json, resource, sys
import megatron_moellava.platform
from megatron_moellava.backbones import get_backbone
from megatron_moellava.config import load_config
from argparse import Namespace
from megatron_moellava.planning.command import dry_run, experts_of
from megatron_moellava.costs.layout import Layout
from megatron_moellava.towers import get_tower

for world_size, settings in json.loads(sys.argv[1]):
    own = experts_of(Namespace(config=None, backbone=settings[0].partition("=")[2]))
    run = load_config(None, ["training.global_batch_size=64", *own, *settings])
    backbone, tower = get_backbone(run.model.backbone), get_tower(run.model.tower)
    rows = dry_run(Layout(run=run, backbone=backbone, tower=tower, world_size=world_size))
    print(json.dumps(rows))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
RUNS = {
    "phi-2 with experts, pipeline and expert parallel": (
        8,
        "model.backbone=phi-2 training.stage=3 moe.num_moe_experts=4 parallel.pipeline_model_parallel_size=2 "
        "parallel.expert_model_parallel_size=4",
    ),
    "llama-3-8b, tensor, expert, virtual pipeline": (
        16,
        "model.backbone=llama-3-8b training.stage=3 moe.num_moe_experts=4 parallel.tensor_model_parallel_size=2 "
        "parallel.pipeline_model_parallel_size=2 parallel.virtual_pipeline_model_parallel_size=2 "
        "parallel.expert_model_parallel_size=2 training.recompute=full",
    ),
    "qwen3-4b, experts recomputed": (
        8,
        "model.backbone=qwen3-4b training.stage=3 moe.num_moe_experts=8 training.recompute=moe",
    ),
    "qwen3-4b, activation of the experts recomputed": (
        8,
        "model.backbone=qwen3-4b training.stage=3 moe.num_moe_experts=8 training.recompute=moe_act",
    ),
    "qwen-1.8b with experts": (8, "model.backbone=qwen-1.8b training.stage=3 moe.num_moe_experts=4"),
    "stablelm-2-1.6b, stages level in cost": (
        8,
        "model.backbone=stablelm-2-1.6b training.stage=3 moe.num_moe_experts=4 parallel.pipeline_model_parallel_size=4 "
        "parallel.pipeline_split=cost",
    ),
    "qwen2-0.5b, tower trained and recomputed": (
        8,
        "model.backbone=qwen2-0.5b training.stage=2 training.trains=[tower,projector] training.recompute_tower=true "
        "data.packing=false training.micro_batch_size=4",
    ),
    "qwen2-0.5b, another tower trained": (
        8,
        "model.backbone=qwen2-0.5b model.tower=siglip-so400m-patch14-384 training.stage=2 "
        "training.trains=[tower,projector] data.packing=false training.micro_batch_size=4",
    ),
    "olmoe-1b-7b, a norm over all heads": (
        8,
        "model.backbone=olmoe-1b-7b-0924 training.stage=2 parallel.expert_model_parallel_size=8",
    ),
    "phi-2 with experts, adapters": (
        8,
        "model.backbone=phi-2 training.stage=3 moe.num_moe_experts=4 training.lora.rank=64 "
        "parallel.tensor_model_parallel_size=2 parallel.expert_model_parallel_size=4",
    ),
    "llama-3-8b, adapters with dropout, pipeline": (
        8,
        "model.backbone=llama-3-8b training.stage=2 training.lora.dropout=0.05 parallel.pipeline_model_parallel_size=2",
    ),
    "vicuna-7b, projector only, padded rows": (
        8,
        "model.backbone=vicuna-7b-v1.5 training.stage=1 data.packing=false training.micro_batch_size=4",
    ),
}


@pytest.fixture(scope="module")
def dry_runs() -> tuple[dict[str, list], int]:
    """(rows of each run's pipeline stages, peak memory of the process in bytes)."""
    jobs = json.dumps([(world_size, settings.split()) for world_size, settings in RUNS.values()])
    done = subprocess.run([sys.executable, "-c", SCRIPT, jobs], capture_output=True, text=True, cwd=REPO, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    *lines, peak = done.stdout.splitlines()
    return {name: json.loads(line) for name, line in zip(RUNS, lines, strict=True)}, int(peak) * 1024


@pytest.mark.parametrize("name", RUNS)
def test_formulas_equal_what_the_full_size_model_counts(name, dry_runs):
    for rows in dry_runs[0][name]:
        for kind in ("num_parameters", "forward_flops", "backward_flops"):
            assert rows[kind]["predicted"] == rows[kind]["counted"], kind
        for kind in ("weights", "gradients", "optimizer"):  # buckets are padded
            assert rows[kind]["predicted"] == pytest.approx(rows[kind]["counted"], rel=1e-3), kind
        assert rows["activations"]["predicted"] == pytest.approx(rows["activations"]["counted"], rel=0.02)


def test_full_size_models_take_no_memory(dry_runs):
    rows, peak = dry_runs
    weights = sum(stage["weights"]["counted"] for stages in rows.values() for stage in stages)
    assert weights > 40e9
    assert peak < 3e9, "the interpreter, torch and megatron-core alone take 0.8 GB"
