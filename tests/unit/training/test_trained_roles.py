"""What is trained is trained, what is frozen is not: every role alone and the usual sets, however activations are kept."""

import pytest
import torch

from megatron_moellava.model.configuration import RECOMPUTE
from megatron_moellava.model.roles import parameter_roles
from megatron_moellava.stages import ROLES
from megatron_moellava.training.loop import Trainer
from tests.helpers.trainers import one_layout, started, state

ROUNDING = (
    1e-5  # of the largest entry: a residual MoE adds the gradients of its input in another order; the others are equal
)
SETS = [(role,) for role in ROLES] + [
    ("experts", "router"),
    ("language.ffn", "experts", "router"),
    ("language.attention", "language.ffn", "language.norm"),
    ("projector", "language.norm"),
]
MODELS = {
    "packed": {},
    "padded": {"rows": "padded"},
    "text": {"rows": "text"},
    "phi": {"model.backbone": "phi-2-tiny"},
    "dense": {"moe": None},
    "first half": {"moe.placement": "first_half"},
    "bf16": {"training.precision": "bf16"},
    "shared experts": {"moe.moe_shared_expert_intermediate_size": 64},
    "residual": {"moe.use_residual": True},
    "sequential": {"moe.moe_grouped_gemm": False},
    "expert bias": {"moe.moe_router_enable_expert_bias": True},
    "fp8": {"training.fp8_recipe": "delayed"},
    "overlap": {"optimizer.overlap_grad_reduce": True},
}
REFUSED = {"dense": ("moe", "moe_act"), "sequential": ("moe_act",), "fp8": ("moe_act",)}  # by validation


@pytest.fixture(scope="module", autouse=True)
def _one_layout():
    """Groups are made once: each has threads that poll, and a set for every trainer would add up to a standstill."""
    with one_layout():
        yield


def step(trainer: Trainer) -> tuple[dict[str, torch.Tensor], set[str]]:
    """(gradients of the trained parameters, names of all that has moved) of one step."""
    gradients: dict[str, torch.Tensor] = {}
    update = trainer.update

    def kept():
        named = trainer.chunks[0].named_parameters()
        gradients.update({name: p.main_grad.clone() for name, p in named if p.requires_grad})
        return update()

    trainer.update, before = kept, state(trainer)
    _, applied, _ = trainer.step()
    assert applied
    return gradients, {name for name, tensor in state(trainer).items() if not torch.equal(tensor, before[name])}


def of_roles(trainer: Trainer, trains: tuple[str, ...]) -> set[str]:
    return {name for role, name, _ in parameter_roles(trainer.chunks[0]) if role in trains}


def check(trains: tuple[str, ...], model: str) -> None:
    """Every recompute mode: the gradients of none, a gradient for every trained parameter, nothing else moves."""
    expected: dict[str, torch.Tensor] = {}
    for recompute in ("none", *(mode for mode in RECOMPUTE if mode != "none")):
        if recompute in REFUSED.get(model, ()):
            continue
        trainer = started(trains, **MODELS[model] | {"training.recompute": recompute})
        gradients, moved = step(trainer)
        expected = expected or gradients
        assert gradients.keys() == of_roles(trainer, trains)
        for name, gradient in gradients.items():
            difference = (gradient - expected[name]).abs().max()
            assert difference <= ROUNDING * expected[name].abs().max(), f"{name} under recompute={recompute}"
        idle = {name for name, gradient in gradients.items() if not gradient.any()}
        if MODELS[model].get("rows") != "text":
            assert len(idle) < len(gradients), f"no gradient at all under recompute={recompute}"
        follows = {name for name in moved if name.endswith(("expert_bias", "local_tokens_per_expert"))}
        follows |= {name for name in moved if name.startswith("fp8 history")}
        assert moved - follows <= gradients.keys(), recompute
        if "router" not in trains:
            assert not {name for name in follows if name.endswith("expert_bias")}, recompute
        if not {"language.attention", "language.ffn", "experts"} & set(trains):
            assert not {name for name in follows if name.startswith("fp8")}, recompute


@pytest.mark.parametrize("trains", SETS, ids="+".join)
def test_every_recompute_mode_gives_the_gradients_of_none_and_moves_nothing_else(trains):
    check(trains, "packed")


@pytest.mark.parametrize(
    ("model", "trains"),
    [
        *((model, ("experts", "router")) for model in MODELS if model not in ("packed", "dense")),
        ("dense", ("language.attention", "language.ffn", "language.norm")),
        ("padded", ("language.attention",)),
        ("expert bias", ("projector",)),
        ("expert bias", ("experts",)),
        ("fp8", ("projector",)),
        ("fp8", ("language.norm", "router")),
        ("residual", ("language.ffn",)),
    ],
    ids=lambda value: value if isinstance(value, str) else "+".join(value),
)
def test_every_kind_of_model_trains_what_it_is_told_and_nothing_else(model, trains):
    check(trains, model)
