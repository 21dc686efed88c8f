"""W + scale * B A of a checkpoint, beside the same sum written out. test_adapter_runs.py runs the result."""

from functools import partial

import torch

from megatron_moellava.config import LoraConfig
from megatron_moellava.conversion.merge import _merged
from megatron_moellava.conversion.tensors import Tensor
from megatron_moellava.costs.adapters import PREFIX, Adapted
from megatron_moellava.mapping import Heads
from tests.helpers.conversion_models import read


def made(value: torch.Tensor) -> Tensor:
    return Tensor(tuple(value.shape), "float32", make=partial(torch.clone, value))


def merged(adapted: Adapted, lora: LoraConfig) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    shapes = {key: tensor.shape for key, tensor in adapted.tensors(lora).items()}
    rows = sum(rows for _, rows in adapted.parts)
    shapes["weight"] = (adapted.experts, rows, adapted.columns) if adapted.experts else (rows, adapted.columns)
    values = {
        key: torch.randn(shape, generator=torch.Generator().manual_seed(len(key))) for key, shape in shapes.items()
    }
    tensors = {f"{PREFIX}{adapted.name}.{key}": made(value) for key, value in values.items()}
    parts = _merged(adapted, made(values["weight"]), tensors, lora)
    return torch.cat([read(part) for part in parts.values()]).view(shapes["weight"]), values


def test_q_k_and_v_lie_by_group():
    heads = Heads(num_attention_heads=4, num_query_groups=2, kv_channels=1)
    parts = (("q", 4), ("k", 2), ("v", 2))
    adapted = Adapted(name="x", role="language.attention", parts=parts, columns=3, split=0, heads=heads)
    got, values = merged(adapted, LoraConfig(rank=2, alpha=6.0))
    delta = [values[f"b_{part}"] @ a for part, a in zip("qkv", values["a"].chunk(3), strict=True)]
    rows = [delta[0][0:2], delta[1][0:1], delta[2][0:1], delta[0][2:4], delta[1][1:2], delta[2][1:2]]
    assert torch.allclose(got, values["weight"] + 3.0 * torch.cat(rows))


def test_every_expert_has_its_own_and_what_they_share():
    adapted = Adapted(name="x", role="experts", parts=(("gate", 4), ("up", 4)), columns=3, split=0, experts=2)
    for shared in (False, True):
        got, values = merged(adapted, LoraConfig(rank=2, alpha=2.0, shared_outer=shared))
        for expert in range(2):
            a = (values["a"] if shared else values["a"][expert]).chunk(2)
            delta = [values[f"b_{part}"][expert] @ own for part, own in zip(("gate", "up"), a, strict=True)]
            assert torch.allclose(got[expert], values["weight"][expert] + torch.cat(delta))
