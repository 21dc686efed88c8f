"""A tiny random model with a real tokenizer, for the tests of the engine: fp32, one process."""

from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from megatron_moellava import parallel
from megatron_moellava.config import (
    DataConfig,
    ExpertGroups,
    Modality,
    ModelConfig,
    MoEConfig,
    ParallelConfig,
    RunConfig,
    TrainingConfig,
)
from megatron_moellava.data.sample import Turn
from megatron_moellava.data.templates import get_template
from megatron_moellava.data.tokenizer import load_tokenizer
from megatron_moellava.inference.engine import Engine
from megatron_moellava.inference.prompts import Prompter
from megatron_moellava.inference.requests import Request, Sampling
from megatron_moellava.model.build import build_model
from megatron_moellava.model.original_gate import OriginalGate, no_noise
from megatron_moellava.training.checkpoint import TrainingState, save_checkpoint
from tests.helpers.paths import ASSETS

TOKENIZER = ASSETS / "tok_spm"
GATES = {
    "dense": None,
    "megatron": MoEConfig(),
    "original deterministic": MoEConfig(
        router="original", moe_expert_capacity_factor=1.5, second_choice="deterministic"
    ),
    "original without noise": MoEConfig(router="original", moe_expert_capacity_factor=1.5),
    "residual": MoEConfig(use_residual=True),
    "sequential experts": MoEConfig(moe_grouped_gemm=False),
    "one choice": MoEConfig(moe_router_topk=1),
    "original, one choice": MoEConfig(
        router="original", moe_router_topk=1, moe_expert_capacity_factor=1.5, eval_capacity_factor=4.0
    ),
    "one choice of weight 1": MoEConfig(moe_router_topk=1, normalize_top1=True),
    "narrow experts": MoEConfig(num_moe_experts=8, moe_router_topk=4, moe_ffn_hidden_size=96),
    "shared experts": MoEConfig(moe_shared_expert_intermediate_size=96),
    "balanced by a bias": MoEConfig(moe_router_enable_expert_bias=True),
    "experts by modality": MoEConfig(num_moe_experts=6, expert_groups=ExpertGroups(image=2, text=2, shared=2)),
    "experts by modality, a penalty": MoEConfig(
        num_moe_experts=6,
        expert_groups=ExpertGroups(image=3, text=3, penalty=1.0, order="dealt"),
        moe_router_enable_expert_bias=True,
    ),
    "probabilities among all": MoEConfig(num_moe_experts=8, moe_router_topk=3, moe_router_pre_softmax=True),
    "scaled, of the best groups, a gated shared expert": MoEConfig(
        num_moe_experts=8,
        moe_router_topk=4,
        moe_router_num_groups=4,
        moe_router_group_topk=2,
        moe_router_enable_expert_bias=True,
        moe_router_topk_scaling_factor=2.5,
        moe_shared_expert_intermediate_size=96,
        moe_shared_expert_gate=True,
    ),
    "scaled": MoEConfig(moe_router_topk_scaling_factor=0.5),
}


def tiny_run(
    moe: MoEConfig | None = None, backbone: str = "llama-tiny", precision: str = "fp32", tower: str = "clip-tiny"
) -> RunConfig:
    return RunConfig(
        model=ModelConfig(backbone=backbone, tower=tower),
        moe=moe,
        training=TrainingConfig(stage=3 if moe else 2, precision=precision),
        data=DataConfig(
            tokenizer=str(TOKENIZER),
            template="v1",
            packing=False,
            image_grid=tower.endswith(("@newline", "@onevision")),
        ),
    )


def tiny_engine(
    moe: MoEConfig | None = None,
    backbone: str = "llama-tiny",
    seed: int = 1,
    tower: str = "clip-tiny",
    modalities: tuple[Modality, ...] = (),
    **options,
) -> Engine:
    parallel.initialize(ParallelConfig(), seed)
    run = tiny_run(moe, backbone, tower=tower)
    run = replace(run, data=replace(run.data, modalities=modalities))
    (model,) = build_model(run)
    scatter(model)
    prompter = Prompter(
        template=get_template("v1"), tokenizer=load_tokenizer(TOKENIZER), tower=model.tower, data=run.data
    )
    engine = Engine(model, prompter, **options)
    for module in model.modules():
        if isinstance(module, OriginalGate):
            module.noise = no_noise
    return engine


def tiny_checkpoint(
    folder: Path, gate: str = "megatron", precision: str = "fp32", backbone: str = "llama-tiny"
) -> Path:
    """Save a random model as a training run would; the process groups exist while it does, and no longer."""
    parallel.initialize(ParallelConfig(), seed=1)
    run = tiny_run(GATES[gate], backbone, precision)
    chunks = build_model(run)
    scatter(chunks[0])
    save_checkpoint(folder, run, chunks, TrainingState(iteration=1, consumed_samples=0, data=None))
    parallel.shutdown()
    return folder


def scatter(model: torch.nn.Module) -> None:
    """Larger weights: with the initial ones every token's logits are nearly the same, and every test passes."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "vision_tower" not in name:
                parameter.mul_(3.0)


def picture(number: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    image = Image.new("RGB", size, (40 * number % 256, 255 - 30 * number % 256, 90))
    ImageDraw.Draw(image).ellipse(
        (3 * number % 20, 4, 18 + 3 * number % 20, 25), fill=(250, 200 - 20 * number % 200, 10)
    )
    return image


def ask(number: int, text: str = "What is it?", images: int = 1, record_routing: bool = False, **sampling) -> Request:
    return Request(
        id=f"r{number}",
        turns=(Turn(role="user", text="<image>\n" * images + text),),
        images=tuple(picture(number + i) for i in range(images)),
        sampling=Sampling(**{"max_new_tokens": 6} | sampling),
        record_routing=record_routing,
    )


def mixed_requests() -> list[Request]:
    """Different lengths, none to two images, a conversation."""
    conversation = (
        Turn(role="user", text="<image>\nWhich colour?"),
        Turn(role="assistant", text="red"),
        Turn(role="user", text="And now?\n<image>"),
    )
    return [
        ask(0),
        ask(1, "Tell me something long about this picture, please.", max_new_tokens=11),
        ask(2, "No picture here.", images=0, max_new_tokens=3),
        ask(3, "Compare both.", images=2, max_new_tokens=8),
        Request(id="r4", turns=conversation, images=(picture(5), picture(9)), sampling=Sampling(max_new_tokens=7)),
    ]


@torch.no_grad()
def uncached(engine, request, tokens) -> torch.Tensor:
    """Logits [T, V] for each of the answer's tokens, from one forward pass over everything."""
    prompt = engine.prompter(request)
    tokens_1S = torch.tensor([[*prompt.tokens, *tokens[:-1]]])
    position_ids_1S = torch.arange(tokens_1S.shape[1])[None]
    own = [part is not None for part in prompt.apart]
    more: dict = {}
    if any(own):  # those of one modality behind the plain ones
        names = {prompt.way(number) for number in range(len(own))} - {""}
        (name,) = names
        order = sorted(range(len(own)), key=lambda number: own[number])
        starts = dict(zip(order, [0, *accumulate(prompt.features[number] for number in order)], strict=False))
        shown = [torch.arange(starts[n], starts[n] + count) for n, count in enumerate(prompt.features)]
        pixels_NCHW = torch.cat([part for part in prompt.apart if part is not None])
        more = {"shows_R": torch.cat(shown), "apart": {name: pixels_NCHW}}
    grids = tuple(grid for grid in prompt.grids if grid)
    logits_1SV = engine.model(tokens_1S, position_ids_1S, pixels_NCHW=prompt.pixels_NCHW, grids=grids, **more)
    return logits_1SV[0, len(prompt.tokens) - 1 :, : engine.prompter.tokenizer.vocab_size]
