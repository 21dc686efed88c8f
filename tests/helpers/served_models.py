"""Tiny random models with their tokenizers, exported for other tools, and what this program answers with them.

One picture and one question, greedily, in fp32: `expected` is what every tool must give.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image

from megatron_moellava import parallel
from megatron_moellava.backbones import get_backbone
from megatron_moellava.config import (
    DataConfig,
    ExpertGroups,
    ModelConfig,
    MoEConfig,
    ParallelConfig,
    RunConfig,
    TrainingConfig,
)
from megatron_moellava.conversion.exports import export_checkpoint
from megatron_moellava.data.encode import IMAGE_TOKEN
from megatron_moellava.data.sample import Turn
from megatron_moellava.inference.load import load_for_inference
from megatron_moellava.inference.requests import Request, Sampling
from megatron_moellava.model.build import build_model
from megatron_moellava.model.moe_llava import MoELlava
from megatron_moellava.training.checkpoint import TrainingState, save_checkpoint
from tests.helpers.inference_models import scatter
from tests.helpers.paths import ASSETS, GOLDEN
from tests.helpers.tokenizer_folders import byte_folder, llama_folder

QUESTION, NEW_TOKENS = "What's  in it?", 8
PICTURE = ASSETS / "images/wide.png"
TOWERS = {"clip-tiny": GOLDEN / "assets/openai/clip-tiny", "siglip-tiny": GOLDEN / "assets/google/siglip-tiny"}
DENSE, MOE = None, MoEConfig()


def _llama(folder: str) -> Callable[[Path], Path]:
    return lambda place: llama_folder(place, folder, "both")


def _bytes(folder: str) -> Callable[[Path], Path]:
    return lambda place: byte_folder(place, folder)


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A model to export. `tokenizer` writes its folder."""

    backbone: str
    tokenizer: Callable[[Path], Path]
    template: str
    moe: MoEConfig | None = None
    tower: str = "clip-tiny"
    image_aspect_ratio: str = "pad"


LLAMA = Case(backbone="llama-tiny", tokenizer=_llama("legacy_true"), template="v1")
QWEN = Case(backbone="qwen2-tiny", tokenizer=_bytes("Qwen2Tokenizer_plain"), template="chatml")
CASES = {
    "Llama": LLAMA,
    "Llama, experts": replace(LLAMA, moe=MOE),
    "Vicuna (legacy: false), SigLIP": replace(LLAMA, tokenizer=_llama("legacy_false"), tower="siglip-tiny"),
    "Mistral, square pictures": replace(
        LLAMA, backbone="mistral-tiny", template="mistral", image_aspect_ratio="square"
    ),
    "Mistral, experts": replace(LLAMA, backbone="mistral-tiny", template="mistral", moe=MOE),
    "Phi-2": Case(backbone="phi-2-tiny", tokenizer=_bytes("CodeGenTokenizer_plain"), template="phi"),
    "Phi-2, experts": Case(
        backbone="phi-2-tiny", tokenizer=_bytes("CodeGenTokenizer_plain"), template="phi", moe=MOE, tower="siglip-tiny"
    ),
    "StableLM-2": Case(backbone="stablelm-2-tiny", tokenizer=_bytes("GPT2Tokenizer_plain"), template="stablelm"),
    "StableLM-2, experts": Case(
        backbone="stablelm-2-tiny", tokenizer=_bytes("GPT2Tokenizer_plain"), template="stablelm", moe=MOE
    ),
    "Qwen v1": Case(backbone="qwen-tiny", tokenizer=_bytes("Qwen2Tokenizer_plain"), template="qwen"),
    "Qwen2": QWEN,
    "Qwen2, experts": replace(QWEN, moe=MOE),
    "Qwen3, experts": replace(QWEN, backbone="qwen3-tiny", moe=MOE),
    "MiniCPM": replace(LLAMA, backbone="minicpm-tiny", template="minicpm"),
    "Llama, residual experts": replace(LLAMA, moe=MoEConfig(use_residual=True)),
    "Llama, experts by modality": replace(
        LLAMA,
        moe=MoEConfig(
            num_moe_experts=6,
            expert_groups=ExpertGroups(image=2, text=2, shared=2),
            moe_router_enable_expert_bias=True,
        ),
    ),
    "Phi-2, experts by modality, a penalty": Case(
        backbone="phi-2-tiny",
        tokenizer=_bytes("CodeGenTokenizer_plain"),
        template="phi",
        moe=MoEConfig(expert_groups=ExpertGroups(image=2, text=2, penalty=1.0, order="dealt")),
    ),
}
# Families whose own models have experts: in a language model alone, too.
NATIVE = {
    name: replace(case, backbone=backbone, moe=get_backbone(backbone).moe)
    for name, case, backbone in (
        ("Mixtral", replace(LLAMA, template="mistral"), "mixtral-tiny"),
        ("OLMoE", LLAMA, "olmoe-tiny"),
        ("DeepSeekMoE", LLAMA, "deepseek-moe-tiny"),
        ("Qwen2-MoE", QWEN, "qwen2-moe-tiny"),
        ("Qwen3-MoE", QWEN, "qwen3-moe-tiny"),
    )
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Expected:
    """What this program makes of PICTURE and QUESTION."""

    prompt: list[int]  # ids; every visual token is an IMAGE_TOKEN
    pixels_NCHW: torch.Tensor
    tokens: list[int]  # of the answer, greedily among the tokenizer's
    logits_SV: torch.Tensor  # of prompt and answer
    known: int  # ids of the tokenizer: nothing can be said with the others

    @property
    def logprobs(self) -> list[float]:
        """Of the answer's tokens, among all ids of the model."""
        logprobs_SV = self.logits_SV[len(self.prompt) - 1 : -1].log_softmax(-1)
        return [float(row[token]) for row, token in zip(logprobs_SV, self.tokens, strict=True)]


def checkpoint_of(case: Case, place: Path, change: Callable[[MoELlava, Path], None] | None = None) -> Path:
    """A checkpoint of a training run, with its tokenizer in `place`/tokenizer. `change`: of the model, before it is saved."""
    tokenizer = case.tokenizer(place / "tokenizer")
    parallel.initialize(ParallelConfig(), seed=1)
    run = RunConfig(
        model=ModelConfig(backbone=case.backbone, tower=str(TOWERS[case.tower])),
        moe=case.moe,
        training=TrainingConfig(stage=3 if case.moe else 2, precision="fp32"),
        data=DataConfig(
            tokenizer=str(tokenizer),
            template=case.template,
            packing=False,
            image_aspect_ratio=case.image_aspect_ratio,
        ),
    )
    chunks = build_model(run)
    scatter(chunks[0])
    if change:
        change(chunks[0], tokenizer)
    save_checkpoint(place / "run", run, chunks, TrainingState(iteration=1, consumed_samples=0, data=None))
    parallel.shutdown()
    return place / "run"


def export_of(case: Case, place: Path, layout: str = "transformers", name: str = "", **options) -> Path:
    """The export of `checkpoint_of`, in `place`/`name` (the layout's)."""
    folder, tokenizer = place / (name or layout), place / "tokenizer"
    export_checkpoint(
        place / "run", save=folder, layout=layout, tokenizer=tokenizer, tower=TOWERS[case.tower], **options
    )
    return folder


@torch.no_grad()
def expected(place: Path, picture: Path | None = PICTURE, change: Callable[[MoELlava], None] | None = None) -> Expected:
    """This program's answer with the checkpoint of `place`, about a picture or (None) none. `change`: of the model."""
    engine = load_for_inference(place / "run")
    if change:
        change(engine.model)
    text = f"<image>\n{QUESTION}" if picture else QUESTION
    request = Request(
        id="one",
        turns=(Turn(role="user", text=text),),
        images=(Image.open(picture).convert("RGB"),) if picture else (),
        sampling=Sampling(max_new_tokens=NEW_TOKENS),
    )
    prompt = engine.prompter(request)
    engine.submit(request)
    answers = []
    while engine.busy:
        answers += [event.completion for event in engine.step() if event.completion is not None]
    row_1S = torch.tensor([prompt.tokens + list(answers[0].tokens)])
    engine.model.eval()
    positions_1S, real_1S = torch.arange(row_1S.shape[1])[None], torch.ones_like(row_1S, dtype=torch.bool)
    pixels = prompt.pixels_NCHW if picture else None
    logits_SV = engine.model(row_1S, positions_1S, None, real_1S, pixels)[0].float()
    known = engine.prompter.tokenizer.vocab_size
    parallel.shutdown()
    return Expected(
        prompt=prompt.tokens,
        pixels_NCHW=prompt.pixels_NCHW,
        tokens=list(answers[0].tokens),
        logits_SV=logits_SV,
        known=known,
    )


def with_image_token(ids: list[int], image_token: int) -> list[int]:
    """Ids as another tool has them."""
    return [image_token if token == IMAGE_TOKEN else token for token in ids]
