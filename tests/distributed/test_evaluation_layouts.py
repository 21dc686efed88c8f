"""tools/evaluate.py in several processes gives the files of one process, also after it was killed in the middle."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.inference_models import picture, tiny_checkpoint
from tests.helpers.paths import REPO

NUM_PICTURES = 6
LAYOUTS = {
    "dp2": [],
    "tp2": ["parallel.tensor_model_parallel_size=2"],
    "pp2": ["parallel.pipeline_model_parallel_size=2"],
    "ep2": ["parallel.expert_model_parallel_size=2"],
    "tp2 ep2": ["parallel.tensor_model_parallel_size=2", "parallel.expert_model_parallel_size=2"],
}


def write_questions(folder: Path) -> None:
    """POPE's question file and labels: three categories of one question per picture."""
    rows = []
    for category in ("adversarial", "popular", "random"):
        labels = []
        for number in range(NUM_PICTURES):
            text = f"Is there a {category} thing number {number} in the image?"
            image = {"question_id": len(rows), "image": f"{number}.png"}
            rows.append(image | {"text": text, "category": category})
            labels.append(image | {"text": text, "label": ("yes", "no")[number % 2]})
        write_lines(folder / "coco" / f"coco_pope_{category}.json", labels)
    write_lines(folder / "llava_pope_test.jsonl", rows)
    (folder / "val2014").mkdir()
    for number in range(NUM_PICTURES):
        picture(number, (40, 30 + number)).save(folder / "val2014" / f"{number}.png")


def write_lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def start(where: Path, out: str, ranks: int, *more: str) -> list[subprocess.Popen]:
    """The processes that torchrun would start; without its agent, so that a kill hits them all at once."""
    command = [sys.executable, str(REPO / "tools/evaluate.py"), "--load", "stage3", "--benchmark", "pope"]
    command += ["--data", "data", "--out", out, "--batch-size", "3", "--bootstrap", "20", *more]
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
    environment = os.environ | world | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    return [
        subprocess.Popen(command, cwd=where, env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(ranks)
    ]


def evaluated(where: Path, out: str, ranks: int, *more: str) -> tuple[str, dict]:
    """(predictions.jsonl, scores.json) of a run that finishes."""
    processes = start(where, out, ranks, *more)
    try:
        assert [process.wait(timeout=600) for process in processes] == [0] * ranks
    finally:
        kill(processes)
    folder = where / out / "pope"
    return (folder / "predictions.jsonl").read_text(), json.loads((folder / "scores.json").read_text())


def kill(processes: list[subprocess.Popen]) -> None:
    for process in processes:
        process.kill()
        process.wait()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> tuple[Path, tuple[str, dict]]:
    """(folder with checkpoint and data, what one process wrote)"""
    where = tmp_path_factory.mktemp("evaluation")
    tiny_checkpoint(where / "stage3")
    write_questions(where / "data/pope")
    predictions, scores = evaluated(where, "alone", 1)
    assert len({json.loads(line)["text"] for line in predictions.splitlines()}) > 10
    return where, (predictions, scores)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_writes_what_one_process_writes(alone, layout):
    where, expected = alone
    assert evaluated(where, layout.replace(" ", "_"), 2, *LAYOUTS[layout]) == expected


def test_a_killed_run_goes_on_with_another_layout(alone):
    where, expected = alone
    processes = start(where, "killed", 2)
    folder = where / "killed/pope"
    try:
        while all(process.poll() is None for process in processes) and answers_in(folder) < 4:
            time.sleep(0.02)
    finally:
        kill(processes)
    left = answers_in(folder)
    assert 4 <= left < 3 * NUM_PICTURES and not (folder / "predictions.jsonl").exists()
    assert evaluated(where, "killed", 2, *LAYOUTS["tp2"]) == expected
    assert not list(folder.glob("*part*"))


def answers_in(folder: Path) -> int:
    return sum(path.read_text().count("\n") for path in folder.glob("predictions.part*.jsonl"))
