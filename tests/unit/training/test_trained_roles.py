"""What is trained is trained, what is frozen is not: every role alone and the usual sets, however activations are kept."""

import pytest
import torch

from megatron_moellava import parallel, platform
from megatron_moellava.config import ConfigError, ParallelConfig, RunConfig, from_dict, set_override
from megatron_moellava.model.configuration import RECOMPUTE
from megatron_moellava.model.roles import parameter_roles
from megatron_moellava.stages import ROLES
from megatron_moellava.training.first_gradients import NothingTrains
from megatron_moellava.training.loop import Trainer
from tests.distributed.rows import MICRO_BATCH, NUM_ROWS, SEQ_LENGTH, Rows
from tests.helpers.process_groups import release_groups

MOE = {"num_experts": 4, "placement": "sparse", "moe_aux_loss_coeff": 0.1}
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
    "sequential": {"moe.experts": "sequential"},
    "expert bias": {"moe.moe_router_enable_expert_bias": True},
    "fp8": {"training.fp8": "delayed"},
    "overlap": {"optimizer.overlap_grad_reduce": True},
}


def run_config(trains: tuple[str, ...], rows: str = "packed", moe: dict | None = MOE, **more) -> RunConfig:
    tree: dict = {"moe": dict(moe)} if moe else {}
    settings = {
        "model.backbone": "llama-tiny",
        "model.tower": "clip-tiny",
        "data.packing": rows != "padded",
        "data.seq_length": SEQ_LENGTH,
        "training.stage": 2,
        "training.trains": list(trains),
        "training.precision": "fp32",
        "training.micro_batch_size": MICRO_BATCH[rows],
        "training.global_batch_size": NUM_ROWS[rows],
        "optimizer.lr_warmup_fraction": 0.0,
        "logging.tensorboard": False,
    }
    for name, value in (settings | more).items():
        set_override(tree, name, value)
    return from_dict(RunConfig, tree)


@pytest.fixture(scope="module", autouse=True)
def _one_layout():
    """Groups are made once: each has threads that poll, and a set for every trainer would add up to a standstill."""
    parallel.initialize(ParallelConfig(), 1)
    yield
    parallel.shutdown()
    release_groups()


def started(trains: tuple[str, ...], rows: str = "packed", **more) -> Trainer:
    run = run_config(trains, rows, **more)
    platform.seed_everything(1)
    parallel.seed_model_parallel(1)
    trainer = Trainer(run, None, 10)
    trainer.loader = Rows(rows, trainer.chunks[0].backbone.vocab_size, trainer.chunks[0].tower, 0, 1)
    for chunk in trainer.wrapped:
        chunk.train()
    return trainer


def state(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Everything that a step may move: parameters, buffers, and the histories of FP8 by module."""
    (model,) = trainer.chunks
    tensors = {name: tensor.detach().clone() for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    for number, history in enumerate(trainer.fp8.state() if trainer.fp8 else []):
        tensors[f"fp8 history {number}"] = history.clone()
    return tensors


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
        if recompute == "moe" and MODELS[model].get("moe", MOE) is None:
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


@pytest.mark.parametrize("recompute", list(RECOMPUTE))
def test_a_run_whose_trained_roles_receive_no_gradient_stops_at_its_first_step(recompute):
    trainer = started(("experts", "router"), **{"training.recompute": recompute})
    trainer.chunks[0].language_model.decoder.register_forward_hook(lambda decoder, inputs, output: output.detach())
    before = state(trainer)
    with pytest.raises(NothingTrains, match="experts, router received no gradient in the first step"):
        trainer.step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(trainer).items() if "local_" not in name)


def test_a_role_without_a_gradient_is_named_beside_those_that_have_one():
    trainer = started(("experts", "language.norm"))
    last = trainer.chunks[0].language_model.decoder.layers[-1]  # only the final norm comes after it
    last.register_forward_hook(lambda layer, inputs, output: (output[0].detach(), *output[1:]))
    with pytest.raises(NothingTrains, match=r"experts received no gradient .* trained are language.norm"):
        trainer.step()


def test_text_rows_alone_are_a_gradient_of_zero_and_not_a_missing_one():
    trainer = started(("projector",), rows="text")
    numbers, applied, _ = trainer.step()
    assert applied and numbers["grad_norm"] == 0.0


def test_a_run_that_has_nothing_to_train_is_refused():
    with pytest.raises(ConfigError, match="experts, router: this model has no such parameters"):
        started(("experts", "router"), moe=None)
