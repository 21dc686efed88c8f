"""What llama.cpp must give with a GGUF export: our prompt, our answer, our log-probabilities.

llama.cpp lives in an environment of its own: `make test-llama-cpp`. The picture has the tower's size, since llama.cpp scales
pictures with code of its own.
"""

import json
import subprocess
from pathlib import Path

import pytest

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
# (a model, --gguf-type) -> how far log-probabilities are: sums in another order; rounding to 11 and to 8 bits.
LOGPROBS = {"f32": 2e-3, "f16": 2e-2, "q8_0": 0.3}
ASKED = {
    **{name: (name, "f32") for name in SERVED},
    **{f"Llama, experts, {kind}": ("Llama, experts", kind) for kind in LOGPROBS},
}
pytestmark = pytest.mark.skipif(not PYTHON.exists(), reason="make test-llama-cpp makes the environment")


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
        checkpoint_of(case, folder)
        ours[name] = {
            kind: expected(folder, seen) for kind, seen in (("picture", place / "picture.png"), ("text", None))
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
    else:
        assert (
            f"__>{' ' * ('false' in name)}\n{QUESTION}" in answered["text"]
        )  # as `<image>` and a line break in training
    precision = ASKED[name][1]
    if precision == "f32":
        assert answered["tokens"][: len(said.tokens)] == said.tokens
        assert answered["logprobs"][: len(said.tokens)] == pytest.approx(said.logprobs, abs=LOGPROBS[precision])
    else:  # random weights leave the best two tokens close together: the first one counts
        assert answered["logprobs"][0] == pytest.approx(said.logprobs[0], abs=LOGPROBS[precision])
