"""Share of right answers by type of question, of what `moellava evaluate --questions` answered.

python examples/modalities/score.py runs/modalities/data/test.jsonl runs/modalities/eval/test/predictions.jsonl
"""

import argparse
import json
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


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", type=Path, help="test.jsonl of make_data.py")
    parser.add_argument("predictions", type=Path, help="predictions.jsonl of `moellava evaluate`")
    args = parser.parse_args()
    for path in (args.questions, args.predictions):
        if not path.is_file():
            parser.error(f"{path} does not exist")
    for kind, (right, asked) in shares(args.questions, args.predictions).items():
        print(f"{kind:<10} {right / asked:6.1%} of {asked}")


if __name__ == "__main__":
    main()
