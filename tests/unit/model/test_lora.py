"""Adapters beside the layers of a built model: products, first values, dropout, merging."""

import pytest
import torch

from megatron_moellava.config import LoraConfig
from megatron_moellava.costs.adapters import Adapted
from megatron_moellava.mapping import QKV, Heads
from megatron_moellava.model.inputs import model_inputs
from megatron_moellava.model.lora import Adapter, fused, merge
from megatron_moellava.stages import TARGETS
from tests.helpers.trainers import one_layout, started

ROUNDING = 1e-5
MODELS = {
    "gated, shared expert": {"moe.moe_shared_expert_intermediate_size": 64},
    "biased, residual": {"model.backbone": "phi-2-tiny", "moe.use_residual": True},
    "one after the other": {"moe.moe_grouped_gemm": False},
    "shared outer": {"training.lora.shared_outer": True},
    "dense": {"moe": None, "training.lora.targets": ["attention", "ffn", "projector", "tower"]},
}


@pytest.fixture(scope="module", autouse=True)
def _one_layout():
    with one_layout():
        yield


def adapted(**settings):
    """A trainer with adapters of an odd rank everywhere, whose B's are not zero."""
    trainer = started(
        (), **{"training.lora.rank": 3, "training.lora.alpha": 3.0, "training.lora.targets": list(TARGETS)} | settings
    )
    with torch.no_grad():
        for parameter in trainer.chunks[0].adapters.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return trainer


@pytest.mark.parametrize("name", MODELS)
def test_merged_equals_unmerged(name):
    trainer = adapted(**MODELS[name])
    (model,) = trainer.chunks
    inputs = model_inputs(next(trainer.loader))
    model.eval()
    with torch.no_grad():
        beside = model(**inputs)
        hooks, model.adapters.hooks = model.adapters.hooks, []
        names = [adapter.adapted.name for adapter in model.adapters]
        model.adapters.hooks = hooks
        merge(model)
        merged = model(**inputs)
    assert model.adapters is None and names
    assert (merged - beside).abs().max() <= ROUNDING * beside.abs().max()


def test_new_adapters_change_nothing_and_every_one_learns():
    trainer, plain = (started((), **{"training.lora.rank": 3}), started(("router",)))
    inputs = model_inputs(next(plain.loader))
    with torch.no_grad():
        for (name, ours), (_, theirs) in zip(
            trainer.chunks[0].named_parameters(), plain.chunks[0].named_parameters(), strict=False
        ):
            ours.copy_(theirs), name
        for chunk in (trainer.chunks[0], plain.chunks[0]):
            chunk.eval()
        assert torch.equal(trainer.chunks[0](**inputs), plain.chunks[0](**inputs))
    trainer.chunks[0].train()
    before = {name: p.detach().clone() for name, p in trainer.chunks[0].named_parameters()}
    for _ in range(2):  # an A has a gradient as soon as its B is not zero
        assert trainer.step()[1]
    moved = {name for name, p in trainer.chunks[0].named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if name.startswith("adapters.")}


def test_first_values_depend_on_name_and_seed_alone():
    one, two, other = (
        dict(started((), **{"training.lora.rank": 3, "training.seed": seed}).chunks[0].adapters.named_parameters())
        for seed in (1, 1, 2)
    )
    a = [name for name in one if name.endswith(".a")]
    assert all(torch.equal(one[name], two[name]) and not torch.equal(one[name], other[name]) for name in a)
    assert len({tuple(one[name].flatten()[:3].tolist()) for name in a}) == len(a)
    assert not any(one[name].any() for name in one if name not in a)
    for name in a:  # U(-1/sqrt(I), 1/sqrt(I)), as peft draws them
        assert 0.9 < one[name].abs().max() * one[name].shape[-1] ** 0.5 <= 1.0


def test_dropout_works_in_training_alone():
    (model,) = (trainer := adapted(**{"training.lora.dropout": 0.5})).chunks
    inputs = model_inputs(next(trainer.loader))
    with torch.no_grad():
        assert not torch.equal(model(**inputs), model(**inputs))
        model.eval()
        assert torch.equal(model(**inputs), model(**inputs))


def test_a_fused_output_has_the_rows_of_the_fused_matrix():
    heads = Heads(num_attention_heads=4, num_query_groups=2, kv_channels=3)
    parts = (("q", 12), ("k", 6), ("v", 6))
    item = Adapted(name="x", role="language.attention", parts=parts, columns=5, split=0, heads=heads)
    outputs = [torch.arange(rows, dtype=torch.float) + 100 * number for number, (_, rows) in enumerate(parts)]
    wanted = [outputs[piece.source][piece.start :][: piece.rows] for piece in QKV("", ()).pieces(24, heads)]
    assert torch.equal(fused(item, outputs), torch.cat(wanted))


def test_a_delta_is_what_the_adapter_adds():
    trainer = adapted(**{"moe.num_moe_experts": 2})
    for adapter in trainer.chunks[0].adapters:
        assert isinstance(adapter, Adapter)
        columns, counts = adapter.adapted.columns, [5, 2]
        input_NI = torch.randn(7, columns)
        adapter.eval()
        delta = adapter.delta()
        if adapter.is_expert:
            wanted = torch.cat([x @ w.T for x, w in zip(input_NI.split(counts), delta, strict=True)])
            got = adapter(input_NI, counts)
        else:
            wanted, got = input_NI @ delta.T, adapter(input_NI)
        assert (got - wanted).abs().max() <= ROUNDING * wanted.abs().max(), adapter.adapted.name


def test_scale_is_of_lora_or_of_rslora():
    assert LoraConfig(rank=4, alpha=8.0).scale == 2.0
    assert LoraConfig(rank=4, alpha=8.0, use_rslora=True).scale == 4.0
