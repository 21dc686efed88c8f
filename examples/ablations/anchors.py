"""Anchors for preferences: pairs about what a model already knows, among those about what it is to learn.

  python examples/ablations/anchors.py --pairs PAIRS/pairs.jsonl --images IMAGES --data runs/quickstart/data --out OUT

An anchor is a question of the quickstart's training data: chosen is its true answer, rejected another answer to questions of
its type ("no" for "yes", one colour for another). So many for each pair are drawn (--share). Written to OUT:

  pairs.jsonl          all pairs and the anchors, in the layout of `moellava make-preferences`
  images               the pictures of both
"""

import argparse
import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path

from compositions import needs, training_questions

from megatron_moellava.commands.program import number

SHARE = 1.0  # anchors for each pair


def write_anchored(
    pairs: Path, images: Path, data: Path, out: Path, *, share: float = SHARE, seed: int = 0
) -> dict[str, int]:
    """Both files; returns how many rows of either kind. The same seed gives the same bytes."""
    made = [json.loads(line) for line in pairs.read_text().splitlines()]
    drawn = anchors(training_questions(data), round(share * len(made)), random.Random(seed))
    copy_pictures(made, images, out / "images")
    copy_pictures(drawn, data / "images", out / "images")
    (out / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (*made, *drawn)))
    return {"pairs": len(made), "anchors": len(drawn)}


def anchors(asked: Sequence[dict], count: int, rng: random.Random) -> list[dict]:
    """So many of {image, question, answer, type}, each as a pair."""
    answers: dict[str, set[str]] = {}
    for question in asked:
        answers.setdefault(question["type"], set()).add(question["answer"])
    return [
        {
            "id": f"anchor-{number}",
            "images": [question["image"]],
            "prompt": [{"from": "human", "value": f"<image>\n{question['question']}"}],
            "chosen": question["answer"],
            "rejected": rng.choice(sorted(answers[question["type"]] - {question["answer"]})),
        }
        for number, question in enumerate(rng.sample(asked, count))
    ]


def copy_pictures(rows: Sequence[dict], source: Path, images: Path) -> None:
    """Links out of an image folder are refused."""
    for image in sorted({image for row in rows for image in row["images"]}):
        (images / image).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / image, images / image)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path, required=True, help="of make-preferences")
    parser.add_argument("--images", type=Path, required=True, help="the pairs' image folder")
    parser.add_argument("--data", type=Path, required=True, help="the quickstart's data")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--share", type=number(float, above=0), default=SHARE, help=f"anchors for each pair ({SHARE})")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (0)")
    args = parser.parse_args()
    needs(parser, args.pairs, args.data / "conversations.json")
    print(write_anchored(args.pairs, args.images, args.data, args.out, share=args.share, seed=args.seed))


if __name__ == "__main__":
    main()
