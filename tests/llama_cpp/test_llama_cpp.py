"""What llama.cpp must give with a GGUF export: our prompt, our answer, our log-probabilities.

llama.cpp lives in an environment of its own: `make test-llama-cpp`. The picture has the tower's size, since llama.cpp scales
pictures with code of its own.
"""

import json
import subprocess
from pathlib import Path

import pytest
import torch

from megatron_moellava.data.tokenizer import load_tokenizer
from megatron_moellava.model.moe_llava import MoELlava
from tests.helpers.inference_models import picture
from tests.helpers.paths import REPO
from tests.helpers.served_models import CASES, NEW_TOKENS, QUESTION, checkpoint_of, expected, export_of

PYTHON = REPO / ".llama-venv/bin/python"
SIZE = 28  # of the towers
SERVED = (
    "Llama",
    "Llama, experts",
    "Vicuna (legacy: false), SigLIP",
    "Mistral, experts",
    "Phi-2",
    "StableLM-2",
    "Qwen v1",
    "Qwen2",
    "Qwen2, experts",
    "Qwen3, experts",
)
# --gguf-type -> how far log-probabilities are from fp32. f32: sums in another order, and llama.cpp's GELU is a table of half
# precision; the others: weights of 11 and of 8 bits (activations, too, where a weight has 8).
LOGPROBS = {"f32": 1e-3, "f16": 4e-3, "q8_0": 0.1}
ASKED = {
    **{name: (name, "f32") for name in SERVED},
    **{f"{name}, {kind}": (name, kind) for name in ("Llama", "Llama, experts") for kind in ("f16", "q8_0")},
}
pytestmark = pytest.mark.skipif(not PYTHON.exists(), reason="make test-llama-cpp makes the environment")


@torch.no_grad()
def say_whole_characters(model: MoELlava, tokenizer: Path) -> None:
    """Pieces of characters get the logit 0, so that no answer has them: llama.cpp's server leaves them out of its report."""
    text = model.language_model
    tied = text.share_embeddings_and_output_weights
    weight_VD = text.embedding.word_embeddings.weight if tied else text.output_layer.weight
    loaded = load_tokenizer(tokenizer)
    for index in range(loaded.vocab_size):
        try:
            loaded.piece(index).decode()
        except UnicodeDecodeError:
            weight_VD[index] = 0


def put_class_token_last(model: MoELlava) -> None:
    """A tower as llama.cpp computes it since May 2025 (its issue 25814): the class token behind the patches, while positions
    and the row that is dropped are those of a class token in front."""
    tower = model.vision_tower

    def embed(pixels_NCHW: torch.Tensor) -> torch.Tensor:
        patches_NPD = tower.conv1(pixels_NCHW).flatten(2).transpose(1, 2)
        rows_NRD = torch.cat([patches_NPD, tower.class_token.expand(len(patches_NPD), -1, -1)], dim=1)
        return tower.ln_pre(rows_NRD + tower.position_embeddings.weight)

    if tower.tower.class_token:
        tower.embed = embed


@pytest.fixture(scope="module")
def asked(tmp_path_factory) -> dict:
    """{name: (what this program says with and without a picture, what llama.cpp says)}"""
    place = tmp_path_factory.mktemp("llama")
    picture(3, (SIZE, SIZE)).save(place / "picture.png")
    ours, models = {}, {}
    for number, name in enumerate(SERVED):
        folder = place / str(number)
        folder.mkdir()
        case = CASES[name]
        checkpoint_of(case, folder, say_whole_characters)
        ours[name] = {
            kind: expected(folder, seen, put_class_token_last)
            for kind, seen in (("picture", place / "picture.png"), ("text", None))
        }
        for question, (model, kind) in ASKED.items():
            if model == name:
                export = export_of(case, folder, "gguf", gguf_type=kind, name=kind)
                said = ours[name]["text"]
                models[question] = {"folder": str(export), "known": said.known, "rows": said.logits_SV.shape[1]}
    questions = {
        "picture": str(place / "picture.png"),
        "question": QUESTION,
        "new_tokens": NEW_TOKENS,
        "models": models,
    }
    (place / "questions.json").write_text(json.dumps(questions))
    command = [str(PYTHON), str(Path(__file__).with_name("ask.py")), "questions.json", "answers.json"]
    result = subprocess.run(command, cwd=place, env={}, capture_output=True, text=True)
    assert (place / "answers.json").exists(), result.stdout[-2000:] + result.stderr[-6000:]
    theirs = json.loads((place / "answers.json").read_text())
    return {question: (ours[model], theirs[question]) for question, (model, _) in ASKED.items()}


@pytest.mark.parametrize("kind", ["picture", "text"])
@pytest.mark.parametrize("name", ASKED)
def test_llama_cpp_gives_our_tokens_and_logprobs(asked, name, kind):
    ours, theirs = asked[name]
    assert "error" not in theirs, theirs["error"]
    said, answered = ours[kind], theirs[kind]
    assert answered["prompt_tokens"] == len(said.prompt)
    if kind == "text":
        assert answered["prompt"] == said.prompt
    else:  # as `<image>` and a line break in training
        assert f"__>{' ' * ('false' in name)}\n{QUESTION}" in answered["text"]
    precision = ASKED[name][1]
    same = common(answered["tokens"], said.tokens)
    far = max(abs(a - b) for a, b in zip(answered["logprobs"][:same], said.logprobs[:same], strict=True))
    print(f"{name}, {kind}: {same} of {len(said.tokens)} tokens, log-probabilities within {far:.1e}")
    # Random weights leave the best tokens close together: with 8 bits the answer may turn at some token, not at the first.
    assert same >= (1 if precision == "q8_0" else len(said.tokens))
    assert far < LOGPROBS[precision]


def common(first: list[int], second: list[int]) -> int:
    """Length of the beginning that both share."""
    pairs = zip(first, second, strict=False)
    return next((place for place, (one, other) in enumerate(pairs) if one != other), min(len(first), len(second)))
