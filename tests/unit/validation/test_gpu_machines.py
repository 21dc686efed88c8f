"""What a run asks of a GPU is refused where it is known that the GPU, or what is installed for it, cannot do it."""

import subprocess
import sys
from dataclasses import replace

import pytest

from megatron_moellava import machine
from megatron_moellava.backbones import get_backbone
from megatron_moellava.config import ModelConfig, MoEConfig, ParallelConfig, RunConfig, TrainingConfig
from megatron_moellava.machine import GPU_CLUSTER, Machine
from megatron_moellava.validation.experts import expert_problems
from megatron_moellava.validation.training import training_problems

HOPPER = replace(GPU_CLUSTER, compute_capability=(9, 0), has_deep_ep=False)
PLAIN = Machine(has_gpu=True, has_transformer_engine=False, has_deep_ep=False, compute_capability=(9, 0))
CPU = Machine(has_gpu=False, has_transformer_engine=False, has_deep_ep=False)


def problems(where: Machine, moe: dict | None = None, parallel: dict | None = None, **training) -> str:
    run = RunConfig(
        model=ModelConfig(backbone="llama-tiny", tower="clip-tiny"),
        training=TrainingConfig(stage=3, **training),
        moe=MoEConfig(**moe or {}),
        parallel=ParallelConfig(**parallel or {}),
    )
    return "\n".join([*training_problems(run, where), *expert_problems(run, get_backbone("llama-tiny"), where)])


FLEX = {"moe_token_dispatcher_type": "flex"}


@pytest.mark.parametrize(
    ("where", "asked", "message"),
    [
        (HOPPER, {"fp8_recipe": "mxfp8"}, "capability 10.0 (Blackwell), and this one has 9.0; use blockwise"),
        (PLAIN, {"fp8_recipe": "blockwise"}, "needs Transformer Engine on a GPU"),
        (PLAIN, {"transformer_impl": "transformer_engine"}, "use auto or local"),
        (CPU, {"transformer_impl": "transformer_engine"}, "use auto or local"),
        (HOPPER, {"transformer_impl": "local"}, "MOELLAVA_TRANSFORMER_IMPL=local as well"),
        (HOPPER, {"device": "cpu"}, "CUDA_VISIBLE_DEVICES= as well"),
        (CPU, {"device": "cuda"}, "torch finds no GPU here"),
        (CPU, {"moe": FLEX, "parallel": {"expert_model_parallel_size": 2}}, "or training.device=cuda where the run"),
        (HOPPER, {"moe": FLEX}, "with parallel.expert_model_parallel_size=1 no token leaves its GPU"),
        (HOPPER, {"moe": FLEX, "parallel": {"expert_model_parallel_size": 2}}, "the package deep_ep, which is not"),
    ],
)
def test_what_a_machine_cannot_do_is_refused(where, asked, message):
    assert message in problems(where, **asked)


def test_what_is_not_known_is_not_refused():
    assert problems(GPU_CLUSTER, fp8_recipe="mxfp8") == ""
    assert problems(GPU_CLUSTER, moe=FLEX, parallel={"expert_model_parallel_size": 2}) == ""
    assert problems(replace(HOPPER, compute_capability=(10, 0)), fp8_recipe="mxfp8") == ""


def installed(folder, extension: str | None) -> None:
    package = folder / "transformer_engine"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise FileNotFoundError('Could not find shared object file')\n")
    if extension:
        (folder / extension).parent.mkdir(exist_ok=True, parents=True)
        (folder / extension).write_bytes(b"")


@pytest.mark.parametrize(
    ("extension", "found"),
    [
        (None, "half"),
        ("transformer_engine_torch.py", "whole"),
        ("transformer_engine/wheel_lib/transformer_engine_torch.cpython-312-x86_64-linux-gnu.so", "whole"),
    ],
)
def test_transformer_engine_is_told_from_what_a_failed_build_leaves(tmp_path, monkeypatch, extension, found):
    installed(tmp_path, extension)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert machine.engine_found() == found


def test_a_half_installed_transformer_engine_does_not_break_the_import(tmp_path):
    installed(tmp_path, None)
    code = "import megatron_moellava.platform as p; import megatron.core.optimizer; print(p.ENGINE_FOUND)"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {code}"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["half"]
