"""What vLLM must give from an export's folder alone: our prompt, our answer, our log-probabilities.

vLLM lives in an environment of its own, where this package is installed without what it depends on: `make test-vllm`. The
question with a picture and the one without run in one batch.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.helpers.paths import REPO
from tests.helpers.served_models import (
    CASES,
    NATIVE,
    NEW_TOKENS,
    PICTURE,
    QUESTION,
    checkpoint_of,
    expected,
    export_of,
    with_image_token,
)

PYTHON = REPO / ".vllm-venv/bin/python"
# Of vLLM's own classes.
STOCK = (
    "Llama",
    "Vicuna (legacy: false), SigLIP",
    "Mistral, square pictures",
    "StableLM-2",
    "Qwen v1",
    "Qwen2",
    "Llama, experts",
    "Mistral, experts",
    "Qwen2, experts",
    "Qwen3, experts",
    "Mixtral",
    "Qwen2-MoE",
    "Qwen3-MoE",
    "OLMoE",
)
# Of the class of transformers with vLLM's attention: text models that vLLM has none of.
THROUGH_TRANSFORMERS, OPTIONS = ("Phi-2",), {"model_impl": "transformers"}
# Of the modelling file, by this package's plugin.
PLUGIN = tuple(name for name in (*CASES, "DeepSeekMoE") if name not in STOCK + THROUGH_TRANSFORMERS)
SERVED = STOCK + THROUGH_TRANSFORMERS + PLUGIN
LANGUAGE = ("Llama", "StableLM-2", "Phi-2", "Mixtral", "Qwen3-MoE")  # alone, as text models
UNSCALED = "MiniCPM, words not scaled beside pictures"
ASKED = [(name, kind) for name in SERVED for kind in ("picture", "text")]
LOGPROBS = 1e-5  # other kernels in fp32; of log-probabilities between -1 and -6
pytestmark = pytest.mark.skipif(not PYTHON.exists(), reason="make test-vllm makes the environment")


@pytest.fixture(scope="module")
def asked(request, tmp_path_factory) -> dict:
    """{name: (what this program says with and without a picture, what vLLM says, image token)}, of what was selected."""
    place = tmp_path_factory.mktemp("vllm")
    selected = {item.callspec.params["name"] for item in request.session.items if item.path == Path(__file__)}
    ours, models, images = {}, {}, {}
    for number, name in enumerate(name for name in SERVED if name in selected):
        folder, case = place / str(number), (CASES | NATIVE)[name]
        folder.mkdir()
        checkpoint_of(case, folder)
        export = export_of(case, folder)
        ours[name] = {"picture": expected(folder), "text": expected(folder, None)}
        known, options = ours[name]["text"].known, OPTIONS if name in THROUGH_TRANSFORMERS else {}
        models[name] = {"folder": str(export), "known": known, "kinds": ["picture", "text"], "options": options}
        images[name] = json.loads((export / "config.json").read_text())["image_token_id"]
        if name in LANGUAGE:
            alone = str(export_of(case, folder, "language-model"))
            models[_alone(name)] = {"folder": alone, "known": known, "kinds": ["text"], "options": {}}
        if name == "MiniCPM":
            models[UNSCALED] = models[name] | {"folder": str(unscaled(export))}
    theirs = ask(place, {"picture": str(PICTURE), "question": QUESTION, "new_tokens": NEW_TOKENS, "models": models})
    return {name: (ours.get(name), answer, images.get(name)) for name, answer in theirs.items()}


def _alone(name: str) -> str:
    return f"{name}, alone"


def unscaled(folder: Path) -> Path:
    """The same MiniCPM as MoE-LLaVA releases it."""
    other = folder.with_name("unscaled")
    other.mkdir()
    for file in folder.iterdir():
        (other / file.name).symlink_to(file)
    config = json.loads((folder / "config.json").read_text()) | {"scale_multimodal_embeddings": False}
    (other / "config.json").unlink()
    (other / "config.json").write_text(json.dumps(config))
    return other


def ask(place: Path, questions: dict) -> dict:
    """The answers of vLLM, by the names of the questions' models."""
    (place / "questions.json").write_text(json.dumps(questions))
    command = [str(PYTHON), str(Path(__file__).with_name("ask.py")), "questions.json", "answers.json"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    result = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)
    assert (place / "answers.json").exists(), result.stdout[-2000:] + result.stderr[-6000:]
    return json.loads((place / "answers.json").read_text())


def assert_same(said, answered: dict, image: int | None) -> None:
    """Prompt, greedy tokens and log-probabilities."""
    assert answered["prompt"] == with_image_token(said.prompt, image)
    assert answered["tokens"] == said.tokens
    assert answered["logprobs"] == pytest.approx(said.logprobs, abs=LOGPROBS)


@pytest.mark.parametrize(("name", "kind"), ASKED)
def test_vllm_gives_our_tokens_and_logprobs(asked, name, kind):
    ours, theirs, image = asked[name]
    assert "error" not in theirs, theirs["error"]
    assert_same(ours[kind], theirs[kind], image)


@pytest.mark.parametrize("name", LANGUAGE)
def test_a_language_model_alone_gives_our_tokens_and_logprobs(asked, name):
    _, theirs, _ = asked[_alone(name)]
    assert "error" not in theirs, theirs["error"]
    assert_same(asked[name][0]["text"], theirs["text"], None)


@pytest.mark.parametrize("name", ["MiniCPM"])
def test_what_depends_on_the_rest_of_the_request_is_refused(asked, name):
    _, theirs, _ = asked[UNSCALED]
    assert "ValueError: scale_multimodal_embeddings=False" in theirs["error"]
