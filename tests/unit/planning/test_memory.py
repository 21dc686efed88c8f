"""The memory formulas against real allocations: a model of tens of megabytes, one real step on a CPU, counted."""

import gc
import json
from collections import Counter
from dataclasses import replace

import pytest
import torch

from megatron_moellava import parallel
from megatron_moellava.backbones import BACKBONES, get_backbone
from megatron_moellava.backbones.from_config import hf_config_of
from megatron_moellava.config import (
    DataConfig,
    LoraConfig,
    ModelConfig,
    MoEConfig,
    ParallelConfig,
    RunConfig,
    TrainingConfig,
)
from megatron_moellava.costs.layout import Layout
from megatron_moellava.costs.parameters import parameters_of, role_of
from megatron_moellava.data.encode import IMAGE_TOKEN
from megatron_moellava.model.build import build_model
from megatron_moellava.model.roles import freeze, parameter_roles
from megatron_moellava.planning.activations import activations_of
from megatron_moellava.planning.counting import SavedTensors, optimizer_bytes, storage_bytes
from megatron_moellava.planning.memory import state_bytes, worst_memory
from megatron_moellava.towers import get_tower
from megatron_moellava.training.optimizer import Update, build_optimizer, wrap_data_parallel
from tests.helpers.planning import layout_of

# What is asked for is 10 %. Measured: 0.5 % at most, the rest being masks and indices that the tables leave out.
TOLERANCE = 0.02
SIZES = {
    "llama-tiny": {
        "num_layers": 4,
        "hidden_size": 256,
        "ffn_hidden_size": 704,
        "num_attention_heads": 8,
        "num_query_groups": 4,
        "kv_channels": 32,
        "vocab_size": 4096,
    },
    "phi-2-tiny": {
        "num_layers": 4,
        "hidden_size": 256,
        "ffn_hidden_size": 1024,
        "num_attention_heads": 8,
        "num_query_groups": 8,
        "kv_channels": 32,
        "vocab_size": 4096,
        "hidden_dropout": 0.1,
    },
}
for name, latent in (
    # Values narrower than keys; queries of a latent of their own.
    ("deepseek-v2-tiny", {"q_lora_rank": None, "v_head_dim": 32}),
    ("deepseek-v3-tiny", {"q_lora_rank": 96, "v_head_dim": 48}),
):
    tiny = BACKBONES[name]
    SIZES[name] = SIZES["llama-tiny"] | {
        "num_query_groups": 8,
        "kv_channels": 48,
        "multi_latent_attention": replace(
            tiny.multi_latent_attention, kv_lora_rank=128, qk_head_dim=32, qk_pos_emb_head_dim=16, **latent
        ),
        "moe": replace(tiny.moe, moe_ffn_hidden_size=256, placement=(1, 2, 3)),
    }
CASES = {
    "dense": ("llama-tiny", 2, None, "none", "bf16"),
    "dense, recomputed": ("llama-tiny", 2, None, "full", "bf16"),
    "projector only": ("llama-tiny", 1, None, "none", "fp32"),
    "experts": ("llama-tiny", 3, MoEConfig(), "none", "bf16"),
    "experts, all recomputed": ("llama-tiny", 3, MoEConfig(), "full", "bf16"),
    "experts, experts recomputed": ("llama-tiny", 3, MoEConfig(), "moe", "fp32"),
    "experts, their activation recomputed": ("llama-tiny", 3, MoEConfig(), "moe_act", "bf16"),
    "biased experts, their activation recomputed": ("phi-2-tiny", 3, MoEConfig(), "moe_act", "fp32"),
    "sequential experts": ("llama-tiny", 3, MoEConfig(moe_grouped_gemm=False), "none", "fp32"),
    "parallel residual": ("phi-2-tiny", 2, None, "none", "fp32"),
    "parallel residual, experts": ("phi-2-tiny", 3, MoEConfig(), "none", "bf16"),
    "latent attention": ("deepseek-v2-tiny", 3, SIZES["deepseek-v2-tiny"]["moe"], "none", "bf16"),
    "latent attention, language trained": (
        "deepseek-v2-tiny",
        2,
        SIZES["deepseek-v2-tiny"]["moe"],
        "none",
        "bf16",
    ),
    "latent attention, latent queries": ("deepseek-v3-tiny", 2, SIZES["deepseek-v3-tiny"]["moe"], "none", "fp32"),
    "latent attention, recomputed": ("deepseek-v3-tiny", 2, SIZES["deepseek-v3-tiny"]["moe"], "full", "bf16"),
    "adapters": ("llama-tiny", 2, None, "none", "bf16", LoraConfig()),
    "adapters, experts": ("phi-2-tiny", 3, MoEConfig(), "none", "bf16", LoraConfig()),
    "adapters with dropout, gated experts": ("llama-tiny", 3, MoEConfig(), "none", "fp32", LoraConfig(dropout=0.1)),
    "adapters, recomputed": ("llama-tiny", 3, MoEConfig(), "full", "bf16", LoraConfig(rank=64)),
}


@pytest.fixture
def layout(request, tmp_path) -> Layout:
    name, stage, moe, recompute, precision, *adapters = CASES[request.param]
    sized = replace(BACKBONES[name], **SIZES[name])
    (tmp_path / "config.json").write_text(json.dumps(hf_config_of(sized)))
    run = RunConfig(
        model=ModelConfig(backbone=str(tmp_path), tower="clip-tiny"),
        moe=moe,
        training=TrainingConfig(
            stage=stage,
            recompute=recompute,
            precision=precision,
            global_batch_size=1,
            lora=adapters[0] if adapters else None,
        ),
        data=DataConfig(seq_length=512),
    )
    backbone, tower = get_backbone(run.model.backbone), get_tower(run.model.tower)
    return Layout(run=run, backbone=backbone, tower=tower, world_size=1)


@pytest.fixture
def built(layout):
    """(model, wrapped, optimizer) of the layout in this process."""
    parallel.initialize(ParallelConfig(), 1)
    (model,) = build_model(layout.run)
    freeze(model, layout.trains)
    wrapped = wrap_data_parallel(layout.run, [model])
    yield model, wrapped[0], build_optimizer(layout.run, wrapped)
    parallel.shutdown()


def inputs(layout: Layout) -> dict:
    """The fullest micro-batch: as many images as fit, the rest text."""
    tokens_BS = torch.randint(0, 4096, (1, layout.tokens))
    tokens_BS[:, : layout.images * layout.tower.num_features] = IMAGE_TOKEN
    side = layout.tower.image_size
    return {
        "tokens_BS": tokens_BS,
        "position_ids_BS": torch.arange(layout.tokens).unsqueeze(0),
        "labels_BS": tokens_BS.clamp(min=0),
        "padding_mask_BS": torch.ones_like(tokens_BS, dtype=torch.bool),
        "pixels_NCHW": torch.randn(layout.images, 3, side, side),
    }


def allocated_by(function) -> tuple[torch.Tensor, int]:
    """(result, bytes that torch's allocator handed out and did not get back while the result lives)."""
    gc.collect()  # what tests before have left would be given back in the middle
    gc.disable()
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            result = function()
    finally:
        gc.enable()
    return result, sum(event.self_cpu_memory_usage for event in profile.key_averages())


@pytest.mark.parametrize("layout", CASES, indirect=True)
def test_formulas_equal_real_allocations(layout, built):
    model, wrapped, optimizer = built
    predicted = activations_of(layout, 0, "local").total
    weights, gradients, states = state_bytes(layout, 0)
    batch = inputs(layout)
    model.train()

    saved = SavedTensors(excluded=model.parameters())
    with saved:
        losses, allocated = allocated_by(lambda: wrapped(**batch))
    assert saved.bytes > 3e6, "too small to say anything"
    assert predicted == pytest.approx(saved.bytes, rel=TOLERANCE)
    assert predicted == pytest.approx(allocated, rel=0.1)

    losses.mean().backward()
    wrapped.finish_grad_sync()
    applied, _ = Update(optimizer)()
    assert applied
    buffers = [*wrapped.buffers, *wrapped.expert_parallel_buffers]
    assert weights == pytest.approx(storage_bytes(model.parameters()), rel=TOLERANCE)
    assert gradients == pytest.approx(storage_bytes(buffer.grad_data for buffer in buffers), rel=TOLERANCE)
    assert states == pytest.approx(optimizer_bytes(optimizer, buffers), rel=TOLERANCE)


@pytest.mark.parametrize("layout", ["parallel residual, experts", "adapters, experts"], indirect=True)
def test_every_parameter_is_predicted_in_its_role(layout, built):
    counted = Counter()
    for role, _, parameter in parameter_roles(built[0]):
        counted[role] += parameter.numel()
    predicted = Counter()
    for part, count in parameters_of(layout, 0).items():
        predicted[role_of(part)] += count
    assert predicted == counted


def test_recomputation_and_parallelism_save_memory():
    plain = worst_memory(layout_of())
    full = worst_memory(layout_of(training__recompute="full"))
    moe = worst_memory(layout_of(training__recompute="moe"))
    activation = worst_memory(layout_of(training__recompute="moe_act"))
    assert full.activations < moe.activations < activation.activations < plain.activations
    split = worst_memory(layout_of(parallel__expert_model_parallel_size=4))
    assert split.weights < plain.weights and split.gradients < plain.gradients
    assert split.optimizer == pytest.approx(plain.optimizer), "a share of as many experts, among fewer ranks"
    tensor = worst_memory(layout_of(parallel__tensor_model_parallel_size=2))
    assert tensor.activations < 0.55 * plain.activations


def test_adapters_make_a_stage_fit_that_full_training_does_not():
    """Phi-2 with 4 experts on one GPU of 40 GiB: the experts alone need 12 bytes more for each parameter when trained."""
    whole = layout_of(world_size=1, training__recompute="full")
    adapted = replace(whole, run=replace(whole.run, training=replace(whole.run.training, lora=LoraConfig(rank=64))))
    limit = 40 * 2**30
    assert worst_memory(whole).total > 2 * limit > 2 * worst_memory(adapted).total
    assert worst_memory(adapted).optimizer < worst_memory(whole).optimizer / 20


def test_frozen_parameters_need_neither_gradient_nor_optimizer():
    whole = layout_of()
    dense = replace(whole, run=replace(whole.run, moe=None, training=replace(whole.run.training, stage=1)))
    memory = worst_memory(dense)
    assert memory.gradients == pytest.approx(4 * 9_180_160)
    assert memory.optimizer == pytest.approx(12 * 9_180_160 / 8)
    assert memory.weights > 5e9


def test_muon_keeps_a_momentum_for_matrices_and_adams_moments_for_embeddings_and_norms():
    adam = layout_of(training__stage=2)
    muon = replace(adam, run=replace(adam.run, optimizer=replace(adam.run.optimizer, optimizer="muon")))
    counts = {part: count for part, count in parameters_of(adam, 0).items() if role_of(part) in adam.trains}
    matrices = sum(count for part, count in counts.items() if part not in ("language.embedding", "language.norm"))
    assert 0 < matrices < sum(counts.values())
    saved = state_bytes(adam, 0)[2] - state_bytes(muon, 0)[2]
    assert saved == pytest.approx(4 * matrices / adam.dp)
