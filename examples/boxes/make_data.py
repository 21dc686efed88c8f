"""Pictures of shapes whose boxes are exactly known: a data set for grounding that costs nothing to make.

  python examples/boxes/make_data.py --out runs/boxes/data

One to three shapes of different colours in a picture of 96 x 72 pixels. Written to OUT: images/, boxes.json (conversations
with `boxes`, see docs/reference/data.md) and boxes_test.jsonl (what `moellava evaluate --benchmark boxes` asks). The same seed
gives the same files; no picture of the test is in the training.
"""

import argparse
import json
import random
from pathlib import Path

from PIL import Image, ImageDraw
from tqdm import trange

from megatron_moellava.commands.program import COUNT

SIZE = (96, 72)
COLORS = ("red", "green", "blue", "yellow", "black", "white", "purple", "orange")
SHAPES = ("circle", "rectangle", "triangle")
SMALLEST, LARGEST = 16, 40  # pixels of a shape's side
MOST = 3  # shapes in a picture


def draw(rng: random.Random) -> tuple[Image.Image, dict[str, list[int]]]:
    """(picture, name of a shape -> its box as left, top, right, bottom); boxes do not overlap."""
    picture = Image.new("RGB", SIZE, tuple(rng.randint(110, 150) for _ in range(3)))
    pen, boxes = ImageDraw.Draw(picture), {}
    for color in rng.sample(COLORS, rng.randint(1, MOST)):
        shape, box = rng.choice(SHAPES), free_box(boxes.values(), rng)
        if box is None:
            break
        left, top, right, bottom = box
        inside = (left, top, right - 1, bottom - 1)  # Pillow counts the last pixel as drawn
        if shape == "circle":
            pen.ellipse(inside, fill=color)
        elif shape == "rectangle":
            pen.rectangle(inside, fill=color)
        else:
            pen.polygon([((left + right - 1) // 2, top), (right - 1, bottom - 1), (left, bottom - 1)], fill=color)
        boxes[f"{color} {shape}"] = box
    return picture, boxes


def free_box(taken, rng: random.Random) -> list[int] | None:
    """A box that overlaps none of those taken; None after many tries."""
    for _ in range(200):
        width, height = (rng.randint(SMALLEST, LARGEST) for _ in range(2))
        left, top = rng.randint(0, SIZE[0] - width), rng.randint(0, SIZE[1] - height)
        box = [left, top, left + width, top + height]
        if all(box[2] <= b[0] or b[2] <= box[0] or box[3] <= b[1] or b[3] <= box[1] for b in taken):
            return box
    return None


def write(out: Path, train: int, test: int, seed: int = 0) -> None:
    """Everything below `out`."""
    rng = random.Random(seed)
    rows, tests = [], []
    for split, count in (("train", train), ("test", test)):
        (out / "images" / split).mkdir(parents=True, exist_ok=True)
        for number in trange(count, desc=f"Drawing pictures to {split}", unit="picture", mininterval=2):
            picture, boxes = draw(rng)
            image = f"{split}/{number}.png"
            picture.save(out / "images" / image, compress_level=1)
            if split == "train":
                rows.append(row(image, boxes))
            else:
                tests += [
                    {"question_id": f"{number}-{name}", "image": image, "text": question(name), "boxes": [box]}
                    for name, box in boxes.items()
                ]
    (out / "boxes.json").write_text(json.dumps(rows, indent=1) + "\n")
    (out / "boxes_test.jsonl").write_text("".join(json.dumps(test) + "\n" for test in tests))


def question(name: str) -> str:
    """What a turn asks."""
    return f"where is the {name}?"


def row(image: str, boxes: dict[str, list[int]]) -> dict:
    """A conversation with a turn for each shape."""
    turns = []
    for name in boxes:
        turns += [{"from": "human", "value": question(name)}, {"from": "gpt", "value": "<box>"}]
    turns[0]["value"] = f"<image>\n{turns[0]['value']}"
    return {"id": image, "image": image, "boxes": list(boxes.values()), "conversations": turns}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--train", type=COUNT, default=8000, help="pictures to train on (8000)")
    parser.add_argument("--test", type=COUNT, default=400, help="pictures that are held out (400)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write(args.out, args.train, args.test, args.seed)
    print(f"{args.out}: boxes.json, boxes_test.jsonl and images/")


if __name__ == "__main__":
    main()
