"""What films.yaml asks for: the video, the words and the credit of one question."""

from pathlib import Path

FILMS = Path("films")


def video(row: dict) -> list[str]:
    return [str(FILMS / row["video"])]


def words(row: dict, lmms_eval_specific_kwargs: dict | None = None) -> str:
    return row["text"]


def score(row: dict, answers: list[str]) -> dict[str, float]:
    return {"accuracy": float(answers[0] == row["answer"])}
