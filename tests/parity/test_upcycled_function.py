"""An upcycled model computes what the dense one did: every family, every placement, every top-k, whole experts and parts."""

import itertools

import pytest
import torch

from megatron_moellava import parallel
from megatron_moellava.config import MoEConfig
from megatron_moellava.conversion.imports import import_checkpoint
from megatron_moellava.conversion.upcycle import upcycle_checkpoint
from megatron_moellava.data.encode import IMAGE_TOKEN
from megatron_moellava.inference.load import load_model
from tests.helpers.conversion_models import TOWER
from tests.helpers.hf_models import BUILDERS
from tests.helpers.inference_models import TOKENIZER

FAMILIES = [name for name in BUILDERS if name != "qwen2_moe"]
INNER = 96  # of every family's MLP here
COPIES, TOPK, GRANULARITY = 4, (1, 2, 3), (1, 2, 3, 8)
PLACEMENTS = ("first_half", "second_half", "sparse", "dense", (1, 2, 3))
EXTRAS = (
    {},
    {"use_residual": True},
    {"moe_router_enable_expert_bias": True},
    {"moe_shared_expert_intermediate_size": INNER},
)
# fp32 logits relative to their largest. The experts' outputs are summed in another order: measured 9e-7 at most.
TOLERANCE = 1e-6

TOKENS = torch.randint(3, 90, (1, 23), generator=torch.Generator().manual_seed(1))
ROW = torch.cat([TOKENS[:, :4], torch.full((1, 16), IMAGE_TOKEN), TOKENS[:, 4:]], dim=1)
PIXELS = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(2))


def logits(folder) -> torch.Tensor:
    model, _ = load_model(folder, tokenizer=str(TOKENIZER), template="v1", precision="fp32")
    model.eval()
    with torch.no_grad():
        positions, real = torch.arange(ROW.shape[1])[None], torch.ones_like(ROW, dtype=torch.bool)
        found = model(ROW, positions, None, real, PIXELS)
    parallel.shutdown()
    return found


def mixture(topk: int, granularity: int, placement, extra: dict) -> MoEConfig:
    return MoEConfig(
        num_moe_experts=COPIES * granularity,
        moe_router_topk=topk * granularity,
        moe_ffn_hidden_size=INNER // granularity if granularity > 1 else None,
        normalize_top1=topk * granularity == 1,
        placement=placement,
        **extra,
    )


def cases(family: str) -> list[MoEConfig]:
    """Every top-k with every granularity; placements and extras in turn, so that all occur with all."""
    biased = family == "phi"  # whose MLPs have biases, which Megatron-Core's shared experts cannot have
    turns = zip(itertools.cycle(PLACEMENTS), itertools.cycle(EXTRAS[: 3 if biased else 4]), strict=False)
    pairs = itertools.product(TOPK, GRANULARITY)
    found = [mixture(*pair, *turn) for pair, turn in zip(pairs, turns, strict=False)]
    return found + [mixture(2, 2, placement, {}) for placement in PLACEMENTS]


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_changes(tmp_path, family):
    BUILDERS[family](tmp_path / "hf")
    import_checkpoint(tmp_path / "hf", save=tmp_path / "dense", tower=str(TOWER))
    before = logits(tmp_path / "dense")
    worst = {}
    for number, moe in enumerate(cases(family)):
        upcycle_checkpoint(tmp_path / "dense", save=tmp_path / f"moe{number}", moe=moe, seed=number)
        difference = (logits(tmp_path / f"moe{number}") - before).abs().max() / before.abs().max()
        worst[str(moe)] = float(difference)
    assert max(worst.values()) <= TOLERANCE, {key: value for key, value in worst.items() if value > TOLERANCE}
    print(family, max(worst.values()))
