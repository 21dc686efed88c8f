"""One forward and backward pass of a model of each kind: its weights come from the CPU's checkpoint, and losses and all
gradients are compared with the CPU's.

Local modules write the checkpoint, so that whatever modules read it (Transformer Engine's, too) hold it whole.
"""

from pathlib import Path

import torch

MOE = {"num_moe_experts": 4, "placement": "sparse"}
ORIGINAL = MOE | {"router": "original", "moe_expert_capacity_factor": 1.5, "second_choice": "deterministic"}
# name: (backbone, tower, moe.*, rows, precision). Rows: "packed", "padded", or "mostly padding".
CASES: dict[str, tuple[str, str, dict | None, str, str]] = {
    "grouped": ("llama-tiny", "clip-tiny", MOE, "packed", "fp32"),
    "sequential": ("llama-tiny", "clip-tiny", MOE | {"moe_grouped_gemm": False}, "packed", "fp32"),
    "dense": ("llama-tiny", "clip-tiny", None, "packed", "fp32"),
    "padded": ("llama-tiny", "clip-tiny", MOE, "padded", "fp32"),
    "biases, parallel residual, part of the rotation": ("phi-2-tiny", "clip-tiny", MOE, "packed", "fp32"),
    "phi padded": ("phi-2-tiny", "clip-tiny", MOE, "padded", "fp32"),
    "stablelm": ("stablelm-2-tiny", "clip-tiny", MOE, "packed", "fp32"),
    "norms of queries and keys": ("qwen3-tiny", "clip-tiny", MOE, "packed", "fp32"),
    "siglip, residual": ("qwen2-tiny", "siglip-tiny", MOE | {"use_residual": True}, "packed", "fp32"),
    "siglip, shared": (
        "qwen2-tiny",
        "siglip-tiny",
        MOE | {"moe_shared_expert_intermediate_size": 64},
        "packed",
        "fp32",
    ),
    "minicpm": ("minicpm-tiny", "clip-tiny", MOE, "packed", "fp32"),
    "qwen": ("qwen-tiny", "clip-tiny", MOE, "packed", "fp32"),
    "mistral": ("mistral-tiny", "clip-tiny", MOE, "packed", "fp32"),
    "latent attention": ("deepseek-v3-tiny", "clip-tiny", MOE, "packed", "fp32"),
    "latent attention padded": ("deepseek-v2-tiny", "clip-tiny", MOE, "padded", "fp32"),
    "original": ("llama-tiny", "clip-tiny", ORIGINAL, "padded", "fp32"),
    "original, mostly padding": (
        "llama-tiny",
        "clip-tiny",
        ORIGINAL | {"moe_expert_capacity_factor": 0.5, "placement": "dense"},
        "mostly padding",
        "fp32",
    ),
    "bf16": ("llama-tiny", "clip-tiny", MOE, "packed", "bf16"),
    "phi bf16": ("phi-2-tiny", "clip-tiny", MOE, "packed", "bf16"),
    "latent attention bf16": ("deepseek-v3-tiny", "clip-tiny", MOE, "packed", "bf16"),
    "original bf16": ("llama-tiny", "clip-tiny", ORIGINAL, "padded", "bf16"),
}


def models(folder: Path, changes: dict) -> dict:
    """{case: {"loss": largest difference over the largest loss, "gradient": worst relative error of a parameter's}}."""
    from megatron_moellava import parallel
    from megatron_moellava.config import ParallelConfig

    place = folder.parent.parent / "models"
    parallel.initialize(ParallelConfig(), seed=1)
    return {"cases": {name: case(place / name.replace(" ", "_"), *CASES[name]) for name in CASES}}


def case(place: Path, backbone: str, tower: str, moe: dict | None, rows: str, precision: str) -> dict:
    from megatron_moellava.checkpoint.folders import require_checkpoint
    from megatron_moellava.config import RunConfig, from_dict
    from megatron_moellava.model.build import build_model
    from megatron_moellava.model.weights import load_weights
    from megatron_moellava.training.checkpoint import TrainingState, save_checkpoint
    from megatron_moellava.verify.session import gathered

    tree = {
        "model": {"backbone": backbone, "tower": tower},
        "training": {"stage": 3 if moe else 2, "precision": precision},
        "data": {"packing": rows == "packed"},
    }
    run = from_dict(RunConfig, tree | ({"moe": moe} if moe else {}))
    chunks = build_model(run)
    if not place.exists():
        draw(chunks[0])
        save_checkpoint(place, run, chunks, TrainingState(iteration=1, consumed_samples=0, data=None))
    load_weights(require_checkpoint(place), chunks)
    losses_BS = chunks[0].train()(**batch(tower, rows))
    losses_BS.float().sum().backward()
    found = gathered(chunks, lambda parameter: None if parameter.grad is None else parameter.grad.detach())
    found["losses"] = losses_BS.detach().float().cpu()
    if not (place / "expected.pt").exists():
        torch.save(found, place / "expected.pt")
    expected = torch.load(place / "expected.pt")
    assert found.keys() == expected.keys(), sorted(found.keys() ^ expected.keys())
    return compared(found, expected)


def compared(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict:
    losses = expected.pop("losses")
    difference = (found["losses"] - losses).abs().max() / losses.abs().max()
    errors = {name: float((found[name] - e).norm() / e.norm().clamp(min=1e-6)) for name, e in expected.items()}
    worst = max(errors, key=errors.__getitem__)
    return {"loss": float(difference), "gradient": errors[worst], "of": worst}


def draw(model: torch.nn.Module) -> None:
    """Weights of which every one matters: with the initial ones, biases and norms could be left out unseen."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_scale = "norm" in name and name.endswith("weight")
            values = 0.08 * torch.randn(parameter.shape, generator=generator) + float(is_scale)
            parameter.copy_(values.to(parameter))


def batch(tower_name: str, rows: str) -> dict:
    """Two pictures in one packed row with an unused end, in two rows, or one picture and three short rows."""
    from megatron_moellava import platform
    from megatron_moellava.towers import get_tower

    tower, generator = get_tower(tower_name), torch.Generator().manual_seed(5)
    image, short, long = tower.num_features, tower.num_features + 12, tower.num_features + 31
    lengths = {"packed": [short + long], "padded": [long, short], "mostly padding": [160, 60, 20, 40]}[rows]
    width = max(lengths) + (9 if rows == "packed" else 0)
    shape = (len(lengths), width)
    tokens_BS = torch.randint(1, 100, shape, generator=generator)
    positions_BS = torch.arange(width).repeat(len(lengths), 1)
    mask_BS = positions_BS < torch.tensor(lengths)[:, None]
    starts = {"packed": [(0, 2), (0, short + 4)], "padded": [(0, 2), (1, 2)], "mostly padding": [(0, 2)]}[rows]
    for row, start in starts:
        tokens_BS[row, start : start + image] = -200
    labels_BS = torch.randint(1, 100, shape, generator=generator)
    labels_BS[:, :3] = -100
    labels_BS[~mask_BS] = -100
    cu_seqlens = None
    if rows == "packed":
        parts = (short, long, width - short - long)
        cu_seqlens = torch.tensor([0, *parts], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        positions_BS = torch.cat([torch.arange(part) for part in parts])[None]
    tensors = {
        "tokens_BS": tokens_BS,
        "position_ids_BS": positions_BS,
        "labels_BS": labels_BS,
        "padding_mask_BS": mask_BS,
        "pixels_NCHW": torch.randn(len(starts), 3, tower.image_size, tower.image_size, generator=generator),
        "cu_seqlens": cu_seqlens,
    }
    there = {name: None if item is None else item.to(platform.device()) for name, item in tensors.items()}
    return there | {"max_seqlen": long if rows == "packed" else width}
