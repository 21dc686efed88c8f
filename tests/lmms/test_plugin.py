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
def place(tmp_path_factory) -> tuple[Path, list[str], dict]:
    """(folder with checkpoint and data, our answers, our record)"""
    where = tmp_path_factory.mktemp("lmms")
    tiny_checkpoint(where / "stage3")
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


def test_mistakes_name_the_argument(place):
    where, *_ = place
    command = ("-m", "lmms_eval", "--model", "megatron_moellava", "--tasks", "moellava_quickstart", "--include_path")
    arguments = ("--model_args", "pretrained=stage3,tensor_size=2")  # lmms-eval logs what went wrong and exits with 0
    said = run(*command, str(REPO / "examples/lmms_eval"), *arguments, where=where)
    assert "tensor_size is neither an argument nor a field of parallel" in said
