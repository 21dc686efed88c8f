"""Share of right answers by type of question, of what `moellava evaluate --questions` answered.

python examples/modalities/score.py runs/modalities/data/test.jsonl runs/modalities/eval/test/predictions.jsonl
"""

import json
import sys
from collections import Counter
from pathlib import Path


def shares(questions: Path, predictions: Path) -> dict[str, tuple[int, int]]:
    """{type: (right, asked)}; an answer counts without its case and full stop."""
    truths = {row["question_id"]: row for row in _rows(questions)}
    right, asked = Counter[str](), Counter[str]()
    for row in _rows(predictions):
        truth = truths[row["question_id"]]
        asked[truth["type"]] += 1
        right[truth["type"]] += row["text"].strip().rstrip(".").lower() == truth["answer"]
    return {kind: (right[kind], count) for kind, count in asked.items()}


def _rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines() if line]


if __name__ == "__main__":
    for kind, (right, asked) in shares(*map(Path, sys.argv[1:])).items():
        print(f"{kind:<10} {right / asked:6.1%} of {asked}")
