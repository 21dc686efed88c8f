"""lmms-eval, started as its users start it, gives the answers and scores of tools/evaluate.py on the same rows.

Runs in lmms-eval's own environment: `make test-lmms`. The model is a random one, so that the truths are made from its own
answers.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.inference_models import picture, tiny_checkpoint
from tests.helpers.paths import REPO
from tests.helpers.videos import write_video

QUESTIONS = (
    ("is there a red circle?", "existence"),
    ("what shape is in the image?", "shape"),
    ("what is the color of the shape, and how do you know?", "color"),
)
LAYOUTS = {
    "one process": "",
    "dp2": "",
    "tp2": "tensor_model_parallel_size=2",
    "pp2": "pipeline_model_parallel_size=2",
    "ep2": "expert_model_parallel_size=2",
}


def run(*command: str, where: Path) -> str:
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(where / "hf")}
    settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)} | offline
    result = subprocess.run(
        [sys.executable, *command], cwd=where, env=os.environ | settings, capture_output=True, text=True, timeout=900
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
    return result.stdout + result.stderr


def write_questions(data: Path, answers: list[str]) -> None:
    rows = [
        {"question_id": number, "image": f"{number // 3}.png", "question": question, "type": kind, "answer": answer}
        for number, ((question, kind), answer) in enumerate(zip(QUESTIONS * 7, answers, strict=True))
    ]
    (data / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def ask_ours(where: Path, out: str) -> tuple[list[str], dict]:
    """(answers, record) of tools/evaluate.py, which also batches."""
    data = ("--data", "runs/quickstart/data", "--out", out, "--batch-size", "4", "--bootstrap", "20")
    run(str(REPO / "tools/evaluate.py"), "--load", "stage3", "--benchmark", "quickstart", *data, where=where)
    folder = where / out / "quickstart"
    rows = [json.loads(line) for line in (folder / "predictions.jsonl").open()]
    return [row["text"] for row in rows], json.loads((folder / "scores.json").read_text())


@pytest.fixture(scope="module")
def where(tmp_path_factory) -> Path:
    """The folder that lmms-eval is started in, with a checkpoint."""
    folder = tmp_path_factory.mktemp("lmms")
    tiny_checkpoint(folder / "stage3")
    return folder


@pytest.fixture(scope="module")
def place(where) -> tuple[Path, list[str], dict]:
    """(folder with checkpoint and data, our answers, our record)"""
    data = where / "runs/quickstart/data"
    (data / "images").mkdir(parents=True)
    for number in range(7):
        picture(number, (40, 30 + 5 * number)).save(data / "images" / f"{number}.png")
    write_questions(data, ["yes"] * 21)
    said, _ = ask_ours(where, "first")
    kinds = [kind for _, kind in QUESTIONS * 7]
    wrong = ["no" if kind == "existence" else "nothing of this" for kind in kinds]
    # The truths of existence questions must be yes or no, which a random model never says.
    truths = [
        w if n % 2 or kind == "existence" else s for n, (s, w, kind) in enumerate(zip(said, wrong, kinds, strict=True))
    ]
    write_questions(data, truths)  # a third of them right
    return where, *ask_ours(where, "second")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_answers_and_scores_equal_those_of_evaluate(place, layout):
    where, said, record = place
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--no-python", sys.executable]
    command = ["-m", "lmms_eval", "--model", "megatron_moellava", "--tasks", "moellava_quickstart", "--batch_size", "4"]
    command += ["--model_args", ",".join(filter(None, ("pretrained=stage3", LAYOUTS[layout])))]
    out = layout.replace(" ", "_")
    command += ["--include_path", str(REPO / "examples/lmms_eval"), "--output_path", out, "--log_samples"]
    output = run(*([] if layout == "one process" else launch), *command, where=where)  # 0 whatever went wrong
    samples = [json.loads(line) for file in (where / out).rglob("*samples*.jsonl") for line in file.open()]
    theirs = [sample["filtered_resps"] for sample in sorted(samples, key=lambda sample: sample["doc_id"])]
    assert theirs == said, output[-3000:]
    assert len(set(said)) > 3
    (results,) = (where / out).rglob("*results.json")
    scores = json.loads(results.read_text())["results"]["moellava_quickstart"]
    assert scores["accuracy,none"] == pytest.approx(record["value"] / 100)
    assert 0 < record["value"] < 100


FILMS = {"a.mp4": 20, "b.mp4": 40, "c.webm": 55}  # frames, ten a second
ABOUT = ("how many stripes are white?", "what happens in the video?")


@pytest.fixture(scope="module")
def films(where) -> tuple[Path, list[str]]:
    """(folder with checkpoint and films, our own answers): half of them are the truths of the task."""
    (where / "films").mkdir()
    for name, frames in FILMS.items():
        write_video(where / "films" / name, frames=frames, codec="libvpx-vp9" if name.endswith("webm") else "mpeg4")
    rows = [
        {"question_id": number, "video": name, "text": text}
        for number, (text, name) in enumerate((text, name) for text in ABOUT for name in FILMS)
    ]
    (where / "films/own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = ("--questions", "films/own.jsonl", "--image-folder", "films", "--max-new-tokens", "12", "--out", "ours")
    run(str(REPO / "tools/evaluate.py"), "--load", "stage3", *asked, "--answers", "said.jsonl", where=where)
    said = [json.loads(line)["text"] for line in (where / "said.jsonl").open()]
    truths = [text if number % 2 else "nothing of this" for number, text in enumerate(said)]
    lines = [json.dumps(row | {"answer": truth}) for row, truth in zip(rows, truths, strict=True)]
    (where / "films/test.jsonl").write_text("".join(line + "\n" for line in lines))
    return where, said


@pytest.mark.parametrize("layout", ["one process", "tp2"])
def test_answers_about_videos_equal_those_of_evaluate(films, layout):
    where, said = films
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--no-python", sys.executable]
    out = f"films_{layout.replace(' ', '_')}"
    command = ["-m", "lmms_eval", "--model", "megatron_moellava", "--tasks", "moellava_films", "--batch_size", "4"]
    command += ["--model_args", ",".join(filter(None, ("pretrained=stage3", LAYOUTS[layout])))]
    command += ["--include_path", str(REPO / "tests/lmms"), "--output_path", out, "--log_samples"]
    output = run(*([] if layout == "one process" else launch), *command, where=where)
    samples = [json.loads(line) for file in (where / out).rglob("*samples*.jsonl") for line in file.open()]
    theirs = [sample["filtered_resps"] for sample in sorted(samples, key=lambda sample: sample["doc_id"])]
    assert theirs == said, output[-3000:]
    assert len(set(said)) > len(ABOUT), "what the films show has a say"
    (results,) = (where / out).rglob("*results.json")
    assert json.loads(results.read_text())["results"]["moellava_films"]["accuracy,none"] == pytest.approx(0.5)


def test_mistakes_name_the_argument(place):
    where, *_ = place
    command = ("-m", "lmms_eval", "--model", "megatron_moellava", "--tasks", "moellava_quickstart", "--include_path")
    arguments = ("--model_args", "pretrained=stage3,tensor_size=2")  # lmms-eval logs what went wrong and exits with 0
    said = run(*command, str(REPO / "examples/lmms_eval"), *arguments, where=where)
    assert "tensor_size is neither an argument nor a field of parallel" in said
