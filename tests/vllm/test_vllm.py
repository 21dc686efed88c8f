"""What vLLM must give from an export's folder alone: our prompt, our answer, our log-probabilities.

vLLM lives in an environment of its own, with another Python: `make test-vllm`. It loads there, and the whole has not run to its
end yet: skipping says nothing of vLLM.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.helpers.paths import REPO
from tests.helpers.served_models import (
    CASES,
    NEW_TOKENS,
    PICTURE,
    QUESTION,
    checkpoint_of,
    expected,
    export_of,
    with_image_token,
)

PYTHON = REPO / ".vllm-venv/bin/python"
SERVED = (
    "Llama",
    "Llama, experts",
    "Vicuna (legacy: false), SigLIP",
    "Mistral, experts",
    "StableLM-2",
    "Qwen2",
    "Qwen2, experts",
    "Qwen3, experts",
)
LOGPROBS = 2e-4  # other kernels in fp32; of log-probabilities between -1 and -6
pytestmark = pytest.mark.skipif(not PYTHON.exists(), reason="make test-vllm makes the environment")


@pytest.fixture(scope="module")
def asked(tmp_path_factory) -> dict:
    """{name: (what this program says with and without a picture, what vLLM says, image token)}"""
    place = tmp_path_factory.mktemp("vllm")
    ours, models, images = {}, {}, {}
    for number, name in enumerate(SERVED):
        folder = place / str(number)
        folder.mkdir()
        checkpoint_of(CASES[name], folder)
        export = export_of(CASES[name], folder)
        ours[name] = {"picture": expected(folder), "text": expected(folder, None)}
        models[name] = {"folder": str(export), "known": ours[name]["text"].known}
        images[name] = json.loads((export / "config.json").read_text())["image_token_id"]
    questions = {"picture": str(PICTURE), "question": QUESTION, "new_tokens": NEW_TOKENS, "models": models}
    theirs = ask(place, questions)
    return {name: (ours[name], theirs[name], images[name]) for name in SERVED}


def ask(place: Path, questions: dict) -> dict:
    (place / "questions.json").write_text(json.dumps(questions))
    command = [str(PYTHON), str(Path(__file__).with_name("ask.py")), "questions.json", "answers.json"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    result = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)
    assert (place / "answers.json").exists(), result.stdout[-2000:] + result.stderr[-6000:]
    return json.loads((place / "answers.json").read_text())


@pytest.mark.parametrize("kind", ["picture", "text"])
@pytest.mark.parametrize("name", SERVED)
def test_vllm_gives_our_tokens_and_logprobs(asked, name, kind):
    ours, theirs, image = asked[name]
    assert "error" not in theirs, theirs["error"]
    said, answered = ours[kind], theirs[kind]
    assert answered["prompt"] == with_image_token(said.prompt, image)
    assert answered["tokens"] == said.tokens
    assert answered["logprobs"] == pytest.approx(said.logprobs, abs=LOGPROBS)
