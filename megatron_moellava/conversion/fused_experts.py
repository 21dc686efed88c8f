"""The experts' adapters of models whose experts transformers keeps in two tensors, gate_up_proj [E, 2 F, H] and down_proj
[E, H, F]: `peft` has one adapter for each tensor (`target_parameters`).

Its A [E R, I] has the A's of all experts below each other, gate above up (R = 2 r) as ours. Its B [O, R E] has the ranks of
an expert E columns apart: column j E + e is column j of expert e, whose B is block-diagonal: gate's rows with gate's ranks.
"""

import math
from collections.abc import Iterator
from functools import partial

from megatron_moellava.config import CheckpointError, LoraConfig
from megatron_moellava.conversion.initial import zeros
from megatron_moellava.conversion.tensors import Tensor, loaded
from megatron_moellava.costs.adapters import PREFIX, Adapted, b_name
from megatron_moellava.costs.shapes import EXPERTS

FUSED = {
    "linear_fc1": ("gate_up_proj", ".base_layer"),
    "linear_fc2": ("down_proj", ""),
}  # (parameter, inside or outside)


def is_fused(adapted: Adapted) -> bool:
    """Whether the matrix is one of routed experts."""
    return EXPERTS in adapted.name


def module_of(names: tuple[str, ...]) -> str:
    """`...mlp.experts.0.gate_proj.weight` and so on -> `...mlp.experts`."""
    return names[0].partition(".experts.")[0] + ".experts"


def parameter_of(adapted: Adapted, names: tuple[str, ...]) -> str:
    """`...mlp.experts.gate_up_proj`, as `target_parameters` names it."""
    return f"{module_of(names)}.{FUSED[adapted.name.rpartition('.')[2]][0]}"


def patterns(lora: LoraConfig) -> dict[str, dict[str, float]]:
    """`rank_pattern` and `alpha_pattern`: two projections in one tensor have twice the rank at the same scale."""
    key = r".*\.gate_up_proj"
    return {"rank_pattern": {key: 2 * lora.rank}, "alpha_pattern": {key: 2 * lora.scale * lora.rank}}


def exported(
    adapted: Adapted, lora: LoraConfig, names: tuple[str, ...], tensors: dict[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """(name without peft's prefix, tensor) of the A and the B of one matrix of all experts."""
    inside = FUSED[adapted.name.rpartition(".")[2]][1]
    rank, own = len(adapted.parts) * lora.rank, f"{PREFIX}{adapted.name}."
    a = tensors[f"{own}a"]
    bs = [tensors[f"{own}{b_name(part)}"] for part, _ in adapted.parts]
    root = module_of(names) + inside
    shape = (adapted.experts * rank, adapted.columns)
    yield f"{root}.lora_A.weight", Tensor(shape, a.dtype, make=partial(_make_a, a, adapted.experts))
    shape = (sum(rows for _, rows in adapted.parts), rank * adapted.experts)
    yield f"{root}.lora_B.weight", Tensor(shape, a.dtype, make=partial(_make_b, bs, adapted.experts, lora.rank))


def imported(
    adapted: Adapted, lora: LoraConfig, names: tuple[str, ...], tensors: dict[str, Tensor], prefix: str
) -> Iterator[tuple[str, Tensor]]:
    """(our name, tensor) of one matrix of all experts. CheckpointError for a B that is not block-diagonal."""
    import torch

    root = prefix + module_of(names) + FUSED[adapted.name.rpartition(".")[2]][1]
    if f"{root}.lora_A.weight" not in tensors:  # a layer that the adapter leaves out
        dtype = next(iter(tensors.values())).dtype
        for key, tensor in adapted.tensors(lora).items():
            yield f"{PREFIX}{adapted.name}.{key}", zeros(tensor.shape, dtype)
        return
    a, b = (tensors[f"{root}.lora_{letter}.weight"] for letter in "AB")
    rank = len(adapted.parts) * lora.rank
    wanted = {
        "A": (adapted.experts * rank, adapted.columns),
        "B": (sum(rows for _, rows in adapted.parts), rank * adapted.experts),
    }
    for letter, read in (("A", a), ("B", b)):
        if read.shape != wanted[letter]:
            raise CheckpointError(
                f"{root}.lora_{letter}.weight: shape {list(read.shape)}, expected {list(wanted[letter])}"
            )
    whole = loaded(b).view(b.shape[0], rank, adapted.experts).permute(2, 0, 1)  # [E, O, P r]
    yield f"{PREFIX}{adapted.name}.a", _made(loaded(a).view(adapted.experts, rank, adapted.columns), a.dtype)
    first = 0
    for number, (part, rows) in enumerate(adapted.parts):
        block = whole[:, first : first + rows]
        own = block[..., number * lora.rank : (number + 1) * lora.rank]
        if torch.count_nonzero(block) != torch.count_nonzero(own):
            raise CheckpointError(
                f"{root}.lora_B.weight mixes the ranks of gate and up, which have adapters of their own here; "
                "merge it with peft (merge_and_unload), and import the result"
            )
        yield f"{PREFIX}{adapted.name}.{b_name(part)}", _made(own.contiguous(), b.dtype)
        first += rows


def _made(value, dtype: str) -> Tensor:
    return Tensor(tuple(value.shape), dtype, make=lambda: value)


def _of_each(tensor: Tensor, experts: int):
    """[E, ...], also of a tensor that all experts share."""
    value = loaded(tensor).view(tensor.shape)
    return value if value.dim() == 3 else value.expand(experts, *value.shape)


def _make_a(a: Tensor, experts: int):
    return _of_each(a, experts).flatten(0, 1)


def _make_b(bs: list[Tensor], experts: int, rank: int):
    import torch

    each = [_of_each(b, experts) for b in bs]
    whole = each[0].new_zeros(experts, sum(b.shape[1] for b in each), len(each) * rank)
    for number, part in enumerate(torch.split(whole, [b.shape[1] for b in each], dim=1)):
        part[..., number * rank : (number + 1) * rank] = each[number]
    return whole.permute(1, 2, 0).reshape(whole.shape[1], math.prod(whole.shape[::2]))
