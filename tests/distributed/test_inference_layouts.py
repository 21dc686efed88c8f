"""Generation under tensor, pipeline and expert parallelism says what one process says."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_moellava import parallel
from megatron_moellava.config import ProjectorMoEConfig, TowerMoEConfig
from megatron_moellava.conversion.upcycle import upcycle_checkpoint
from megatron_moellava.inference.load import load_for_inference
from tests.distributed.generation_worker import answers_of, requests_of_the_test
from tests.helpers.inference_models import tiny_checkpoint
from tests.helpers.paths import REPO

HERE = Path(__file__).parent
LAYOUTS = {
    "tp2": {"tensor_model_parallel_size": 2},
    "pp2": {"pipeline_model_parallel_size": 2},
    "ep2": {"expert_model_parallel_size": 2},
    "dp2": {},
    "tp2 ep2": {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2},
}
VISION = (
    "dense, with experts in tower and projector"  # one rank's pictures meet those of another at the experts, or none
)
CASES = [
    *(("megatron", name, False) for name in LAYOUTS),
    ("megatron", "ep2", True),
    ("original deterministic", "tp2", False),
    ("original deterministic", "ep2", False),
    ("residual", "pp2", False),
    *((VISION, name, False) for name in LAYOUTS if name != "dp2"),
    ("latent attention", "tp2", False),
    ("latent attention", "pp2", False),
]
BACKBONES = {"latent attention": ("megatron", "deepseek-v3-tiny")}  # of cases that are no gate: gate and backbone


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, tuple[Path, dict]]:
    """(checkpoint, answers of one process) by gate."""
    found = {}
    for gate in {gate for gate, *_ in CASES}:
        folder = tmp_path_factory.mktemp("generation")
        if gate == VISION:  # with noise, so that it matters who meets which expert
            tiny_checkpoint(folder / "dense", "dense")
            vision = {"tower_moe": TowerMoEConfig(), "projector_moe": ProjectorMoEConfig()}
            folder = folder / "moe"
            upcycle_checkpoint(folder.parent / "dense", save=folder, moe=None, noise_std=0.5, **vision)
        else:
            router, backbone = BACKBONES.get(gate, (gate, "llama-tiny"))
            tiny_checkpoint(folder, router, backbone=backbone)
        engine = load_for_inference(folder, max_batch_size=4)
        answers = answers_of(engine, requests_of_the_test())
        parallel.shutdown()
        found[gate] = folder, answers
    return found


def tokens_of(answers: dict) -> dict:
    return {name: tokens for name, (tokens, _) in answers.items()}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def answers_under(checkpoint: Path, out: Path, layout: dict, replicated: bool) -> list[dict]:
    """What each of two ranks answered."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(REPO),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
    }
    job = json.dumps({"layout": layout, "replicated": replicated})
    command = [sys.executable, str(HERE / "generation_worker.py"), str(checkpoint), str(out), job]
    processes = [
        subprocess.Popen(command, env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(2)
    ]
    try:
        assert [process.wait(timeout=600) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize(("gate", "layout", "replicated"), CASES)
def test_every_layout_says_what_one_process_says(checkpoints, tmp_path, gate, layout, replicated):
    checkpoint, expected = checkpoints[gate]
    told = answers_under(checkpoint, tmp_path / "out", LAYOUTS[layout], replicated)
    first, second = (rank["answers"] for rank in told)
    assert gate != "megatron" or all(rank["cached"] for rank in told), "the second turn was read whole"
    assert tokens_of(first | second) == tokens_of(expected)
    for name, (_, logprobs) in (first | second).items():
        torch.testing.assert_close(torch.tensor(logprobs), torch.tensor(expected[name][1]), atol=1e-4, rtol=0)
    assert any(logprobs for _, logprobs in expected.values())
    shared = layout in ("ep2", "dp2") and not replicated
    assert (not first.keys() & second.keys()) if shared else first == second
