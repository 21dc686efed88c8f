"""Muon beside its formula (arXiv 2502.16982), written out; layouts are in tests/distributed/test_muon.py."""

import pytest
import torch

from megatron_moellava.machine import is_installed
from megatron_moellava.model.roles import parameter_roles
from megatron_moellava.validation.training import muon_layout_problems
from tests.helpers.runs import problems, tiny
from tests.helpers.trainers import one_layout, started, state

ROLES = ("tower", "projector", "language.embedding", "language.attention", "language.norm", "experts", "router")
LR, DECAY, MOMENTUM = 2e-3, 0.1, 0.95
SETTINGS = {
    "optimizer.optimizer": "muon",
    "optimizer.muon_fp32_matmul_prec": "highest",
    "optimizer.lr": LR,
    "optimizer.lr_decay_style": "constant",
    "optimizer.weight_decay": DECAY,
    "optimizer.clip_grad": 0.0,
}
# https://github.com/KellerJordan/modded-nanogpt, its coefficients of the quintic iteration.
QUINTIC = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)


@pytest.fixture(scope="module")
def one_process():
    with one_layout():
        yield


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    x = matrix.double() / matrix.double().norm()
    x = x.T if x.shape[0] > x.shape[1] else x
    for a, b, c in QUINTIC:
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    x = x.T if matrix.shape[0] > matrix.shape[1] else x
    return x * max(matrix.shape) ** 0.5


def step_of(momentum: torch.Tensor, heads: tuple[int, ...] | None) -> torch.Tensor:
    """`heads`: the rows of query, key and value in each group of an attention matrix."""
    if heads is None:
        return orthogonal(momentum)
    groups = momentum.view(-1, sum(heads), momentum.shape[-1])
    parts = [orthogonal(part.reshape(-1, momentum.shape[-1])) for part in groups.split(heads, dim=1)]
    joined = [part.view(len(groups), rows, -1) for part, rows in zip(parts, heads, strict=True)]
    return torch.cat(joined, dim=1).view(momentum.shape)


def heads_of(model, name: str) -> tuple[int, ...] | None:
    if not name.endswith("linear_qkv.weight"):
        return None
    config = model.get_submodule(name.removesuffix(".linear_qkv.weight")).config
    width = config.kv_channels
    return config.num_attention_heads // config.num_query_groups * width, width, width


def is_stepped_by_muon(role: str, name: str, parameter: torch.Tensor) -> bool:
    return parameter.dim() == 2 and role != "language.embedding" and "embedding" not in name


def test_matrices_follow_the_formula_and_the_rest_adamw(one_process):
    trainer, adam = started(ROLES, **SETTINGS), started(ROLES, **SETTINGS | {"optimizer.optimizer": "adam"})
    (model,) = trainer.chunks
    trained = [(role, name, value) for role, name, value in parameter_roles(model) if value.requires_grad]
    matrices = {name: value for role, name, value in trained if is_stepped_by_muon(role, name, value)}
    assert {role for role, name, _ in trained if name in matrices} == {*ROLES} - {"language.embedding", "language.norm"}
    expected = {name: value.detach().double().clone() for name, value in matrices.items()}
    momenta = {name: torch.zeros_like(value) for name, value in expected.items()}
    update = trainer.update

    def recorded():
        for name, value in matrices.items():
            momenta[name].lerp_(value.main_grad.double(), 1 - MOMENTUM)
            expected[name].mul_(1 - LR * DECAY).sub_(step_of(momenta[name], heads_of(model, name)), alpha=LR)
        return update()

    trainer.update = recorded
    for number in range(3):
        assert trainer.step()[1]
        if number == 0:
            adam.step()
            here, there = state(trainer), state(adam)
            for name, value in here.items():
                if name not in matrices:
                    torch.testing.assert_close(value, there[name], rtol=1e-6, atol=1e-7)
    for name, value in matrices.items():
        error = float((value.detach().double() - expected[name]).abs().max() / expected[name].abs().max())
        assert error < 1e-4, f"{name}: {error:.1e}"  # what an orthogonalization makes of fp32's rounding


def test_a_step_without_a_finite_gradient_changes_nothing(one_process, monkeypatch):
    trainer = started(ROLES, **SETTINGS)
    assert trainer.step()[1]
    before = state(trainer)
    momenta = [part.optimizer.state_dict()["state"] for part in trainer.optimizer.chained_optimizers]
    kept = [value.clone() for states in momenta for one in states.values() for value in one.values()]
    parameter = next(parameter for parameter in trainer.chunks[0].parameters() if parameter.requires_grad)
    reduce = trainer._finalize_gradients

    def poisoned(*arguments, **options):
        reduce(*arguments, **options)
        parameter.main_grad.fill_(float("nan"))

    monkeypatch.setattr(trainer.chunks[0].config, "finalize_model_grads_func", poisoned)
    assert not trainer.step()[1]
    assert all(torch.equal(value, before[name]) for name, value in state(trainer).items())
    states = [part.optimizer.state_dict()["state"] for part in trainer.optimizer.chained_optimizers]
    now = [value for one in states for each in one.values() for value in each.values()]
    assert all(torch.equal(value, old) for value, old in zip(now, kept, strict=True))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_same_command_goes_on_with_the_same_numbers(one_process, tmp_path, precision):
    options = SETTINGS | {"training.precision": precision, "checkpoint.save": str(tmp_path)}
    whole = started(ROLES, **options)
    for _ in range(2):
        whole.step()
    whole.save()
    whole.step()
    resumed = started(ROLES, **options)
    assert resumed.state.iteration == 2
    resumed.loader._step = 2
    resumed.loader._iterator = resumed.loader._batches()
    resumed.step()
    one, other = state(whole), state(resumed)
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_fp32_copies_know_whose_they_are(one_process):
    trainer = started(ROLES, **SETTINGS, **{"training.precision": "bf16"})
    model = trainer.chunks[0]
    attention = model.language_model.decoder.layers[0].self_attention.linear_qkv.weight
    assert attention.main_param.is_qkv and attention.main_param.qkv_split_shapes == attention.qkv_split_shapes
    experts = [value for name, value in model.named_parameters() if ".experts." in name and value.dim() == 2]
    assert experts and all(value.main_param.expert_tp for value in experts)


def test_a_layout_that_would_count_experts_twice_is_refused():
    tp2 = {"optimizer__optimizer": "muon", "parallel__tensor_model_parallel_size": 2}
    said = "2 ranks would hold the same experts"
    assert said in problems(2, **tp2)
    for more in ({"parallel__expert_tensor_parallel_size": 2}, {"parallel__expert_model_parallel_size": 2}):
        assert not list(muon_layout_problems(tiny(**tp2, **more), 2))
    assert not list(muon_layout_problems(tiny(**tp2), 4)), "with data parallelism they are divided"


@pytest.mark.parametrize("fields, message", [
    ({"training__precision": "fp16"}, "training.precision=fp16 does not go with optimizer.optimizer=muon"),
    ({"training__lora__rank": 4}, "training.lora does not go with optimizer.optimizer=muon: Muon steps whole matrices"),
    ({"optimizer__ema_decay": 0.9}, "optimizer.ema_decay does not go with"),
    ({"optimizer__main_params_dtype": "bf16"}, "optimizer.main_params_dtype=bf16 does not go with"),
    ({"optimizer__overlap_param_gather": True}, "optimizer.overlap_param_gather=true does not go with"),
    ({"optimizer__muon_num_ns_steps": 0}, "optimizer.muon_num_ns_steps=0 must be at least 1"),
])  # fmt: skip
def test_what_muon_cannot_do_is_refused(fields, message):
    said = problems(1, optimizer__optimizer="muon", **fields)
    assert message in said
    assert ("pip install 'megatron-moellava[muon]'" in said) != is_installed("emerging_optimizers")
