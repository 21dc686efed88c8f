"""Several of easy-VQA's shapes in one picture, and a poll: "is there a red shape?", "is there a circle?"

  python examples/ablations/compositions.py --data runs/quickstart/data --out OUT

Two to four pictures of one of easy-VQA's splits give their shapes, pixel by pixel and in their own size, to one picture. What
a shape is, the questions about its own picture tell. The quickstart trains on pictures of one shape. A poll asks of every
colour and every form in a picture, and of as many that are not there. Written to OUT, in the layout of the quickstart's data:

  polls.json           of compositions of training pictures: LLaVA rows, one for each thing asked of
  test.jsonl           of compositions of held-out pictures: questions of the types "present existence" and "absent
                       existence"; and held-out questions of easy-VQA itself, of the type "ordinary"
  images               the pictures of both
"""

import argparse
import json
import random
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_moellava.commands.program import COUNT, number

sys.path.insert(0, str(Path(__file__).parents[1] / "quickstart"))

SIDE = 72  # pixels: what the quickstart's tower looks at
FEWEST, MOST = 2, 4  # shapes in a picture
TRAIN, TEST, ORDINARY = 120, 90, 400  # pictures of either split, and questions of easy-VQA
ANY = "shape"  # of a colour, whatever its form: easy-VQA's own word
APART = 3  # pixels between two shapes
TRIES = 50  # places that are drawn for a shape, before the whole picture is drawn anew


@dataclass(frozen=True, slots=True)
class Shape:
    """One picture of easy-VQA."""

    picture: Path
    things: tuple[str, str]  # "red shape", "circle"


@dataclass(frozen=True, slots=True)
class Composition:
    """A picture, and what is asked of it."""

    image: str
    polls: list[tuple[str, str]]  # thing, "present" or "absent"


def write_compositions(
    data: Path, out: Path, *, train: int = TRAIN, test: int = TEST, ordinary: int = ORDINARY, seed: int = 0
) -> dict[str, int]:
    """All files; returns how many questions of each type they hold. The same seed gives the same bytes."""
    from make_data import write_json

    rng = random.Random(seed)
    asked = [json.loads(line) for line in (data / "test.jsonl").read_text().splitlines()]
    trained = write_pictures(out, "train", known_shapes(training_questions(data), data / "images"), train, rng)
    held_out = write_pictures(out, "test", known_shapes(asked, data / "images"), test, rng)
    write_json(out / "polls.json", [row for composition in trained for row in poll_rows(composition)])
    tests = [question for composition in held_out for question in poll_questions(composition)]
    tests += ordinary_questions(asked, data / "images", out / "images", ordinary)
    (out / "test.jsonl").write_text("".join(json.dumps(question) + "\n" for question in tests))
    kinds = Counter(question["type"] for question in tests)
    return {"polls": sum(len(composition.polls) for composition in trained), **kinds}


# --- pictures -------------------------------------------------------------------------------------------------------------


def training_questions(data: Path) -> list[dict]:
    """{image, question, answer, type} of every turn about a picture in conversations.json."""
    found = []
    for row in json.loads((data / "conversations.json").read_text()):
        if "image" not in row:
            continue
        texts = [turn["value"].removeprefix("<image>\n") for turn in row["conversations"]]
        for question, answer, kind in zip(texts[::2], texts[1::2], row["tag"].split("+"), strict=True):
            found.append({"image": row["image"], "question": question, "answer": answer, "type": kind})
    return found


def known_shapes(asked: Iterable[dict], images: Path) -> list[Shape]:
    """Those whose colour and form the questions about their pictures tell."""
    from make_data import describe

    rows = [(question["image"], question["question"], question["answer"], question["type"]) for question in asked]
    texts = {image: text.split() for image, text in describe(rows).items()}
    things = {image: (f"{words[1]} {ANY}", words[-1]) for image, words in texts.items()}
    known = set(all_things())
    return [Shape(images / image, both) for image, both in sorted(things.items()) if known.issuperset(both)]


def all_things() -> list[str]:
    """Every colour and every form."""
    from make_data import COLORS, SHAPES

    return [*(f"{color} {ANY}" for color in COLORS.split("|")), *SHAPES.split("|")]


def write_pictures(out: Path, split: str, shapes: Sequence[Shape], count: int, rng: random.Random) -> list[Composition]:
    """So many pictures below OUT/images/compositions."""
    folder = out / "images" / "compositions" / split
    folder.mkdir(parents=True, exist_ok=True)
    made: list[Composition] = []
    while len(made) < count:
        chosen = rng.sample(shapes, rng.randint(FEWEST, MOST))
        picture = compose(chosen, rng)
        if picture is not None:
            image = f"compositions/{split}/{len(made)}.png"
            picture.save(out / "images" / image)
            made.append(Composition(image, polls({thing for shape in chosen for thing in shape.things}, rng)))
    return made


def compose(shapes: Sequence[Shape], rng: random.Random):
    """The shapes on the first one's background, none touching another; None where there was no place left for one."""
    import numpy as np
    from PIL import Image

    cuts = [cut_out(shape.picture) for shape in shapes]
    canvas_HWC = np.tile(cuts[0][2], (SIDE, SIDE, 1))
    taken_HW = np.zeros((SIDE, SIDE), bool)
    for pixels_hwC, inside_hw, _ in cuts:
        place = free_place(taken_HW, inside_hw.shape, rng)
        if place is None:
            return None
        canvas_HWC[place][inside_hw] = pixels_hwC[inside_hw]
        taken_HW[place] = True
    return Image.fromarray(canvas_HWC)


def free_place(taken_HW, size: tuple[int, int], rng: random.Random) -> tuple[slice, slice] | None:
    """Where a box of `size` is APART pixels from all that is taken; None after TRIES tries."""
    for _ in range(TRIES):
        top, left = (rng.randint(0, SIDE - length) for length in size)
        bottom, right = top + size[0], left + size[1]
        if not taken_HW[max(0, top - APART) : bottom + APART, max(0, left - APART) : right + APART].any():
            return slice(top, bottom), slice(left, right)
    return None


def cut_out(picture: Path):
    """(pixels [h, w, C] of the box around the shape, which of them are the shape's [h, w], the background's colour [C])"""
    import numpy as np
    from PIL import Image

    pixels_HWC = np.asarray(Image.open(picture).convert("RGB"))
    colours, counts = np.unique(pixels_HWC.reshape(-1, 3), axis=0, return_counts=True)
    background_C = colours[counts.argmax()]
    inside_HW = (pixels_HWC != background_C).any(axis=2)
    box = tuple(
        slice(found[0], found[-1] + 1) for found in (np.flatnonzero(inside_HW.any(axis=axis)) for axis in (1, 0))
    )
    return pixels_HWC[box], inside_HW[box], background_C


# --- questions ------------------------------------------------------------------------------------------------------------


def polls(here: set[str], rng: random.Random) -> list[tuple[str, str]]:
    """Every thing that is there, and as many that are not, as far as there are such."""
    missing = [thing for thing in all_things() if thing not in here]
    absent = rng.sample(missing, min(len(here), len(missing)))
    return [*((thing, "present") for thing in sorted(here)), *((thing, "absent") for thing in absent)]


def asked_and_true(thing: str, kind: str) -> tuple[str, str]:
    """A poll's question and its answer."""
    return f"is there a {thing}?", "yes" if kind == "present" else "no"


def poll_rows(composition: Composition) -> list[dict]:
    """A LLaVA row for each poll, so that no answer gives another one away."""
    from make_data import row

    turns = [asked_and_true(*poll) for poll in composition.polls]
    return [
        row(composition.image, [(f"<image>\n{question}", answer)], number=number, tag="existence")
        for number, (question, answer) in enumerate(turns)
    ]


def poll_questions(composition: Composition) -> list[dict]:
    """A held-out question for each poll."""
    found = []
    for thing, kind in composition.polls:
        question, answer = asked_and_true(thing, kind)
        found.append({"image": composition.image, "question": question, "answer": answer, "type": f"{kind} existence"})
    return found


def ordinary_questions(asked: Sequence[dict], source: Path, images: Path, count: int) -> list[dict]:
    """So many questions of easy-VQA's, at even distances, and their pictures."""
    count = min(count, len(asked))
    chosen = [asked[number * len(asked) // count] for number in range(count)]
    for image in sorted({question["image"] for question in chosen}):
        (images / image).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / image, images / image)
    return [
        {key: question[key] for key in ("image", "question", "answer")} | {"type": "ordinary"} for question in chosen
    ]


def needs(parser: argparse.ArgumentParser, *files: Path) -> None:
    """End with a sentence where the quickstart has not written what is read."""
    missing = [str(file) for file in files if not file.exists()]
    if missing:
        parser.error(f"{', '.join(missing)} missing; run `make quickstart PRESET=fast` first, and name its files")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the quickstart's data")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--train", type=COUNT, default=TRAIN, help=f"compositions of training pictures ({TRAIN})")
    parser.add_argument("--test", type=COUNT, default=TEST, help=f"compositions of held-out pictures ({TEST})")
    parser.add_argument(
        "--ordinary", type=number(int, least=0), default=ORDINARY, help=f"questions of easy-VQA's ({ORDINARY})"
    )
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (0)")
    args = parser.parse_args()
    needs(parser, args.data / "test.jsonl", args.data / "conversations.json")
    counts = {"train": args.train, "test": args.test, "ordinary": args.ordinary}
    print(write_compositions(args.data, args.out, **counts, seed=args.seed))


if __name__ == "__main__":
    main()
