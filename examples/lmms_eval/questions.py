"""What quickstart.yaml asks for: the picture, the words and the credit of one question of test.jsonl."""

from pathlib import Path

from PIL import Image

from megatron_moellava.evaluation.quickstart.metrics import is_existence, normalise

IMAGES = Path("runs/quickstart/data/images")


def picture(row: dict) -> list[Image.Image]:
    return [Image.open(IMAGES / row["image"]).convert("RGB")]


def words(row: dict, lmms_eval_specific_kwargs: dict | None = None) -> str:
    return row["question"]


def score(row: dict, answers: list[str]) -> dict[str, float]:
    right = float(normalise(answers[0]) == normalise(row["answer"]))
    return {"accuracy": right} | ({"existence_accuracy": right} if is_existence(row["type"]) else {})
