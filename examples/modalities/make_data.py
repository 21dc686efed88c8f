"""Depth and thermal pictures with exactly known truth, made of any folder of real pictures.

  python examples/modalities/make_data.py --pictures runs/quickstart/data/images --out runs/modalities/data

A scene is a picture with two others in front of it, left and right, each at a distance and of a temperature that nothing in
the colours tells. Written to OUT: images/ with a plain PNG, a depth PNG (16 bits, millimetres, 0 where nothing was measured)
and a radiometric TIFF (floats, hundredths of a kelvin) of each scene; train.json (conversations) and test.jsonl (questions with
their answers, for `moellava evaluate --questions`). The truth is exact: distances are whole metres, temperatures whole degrees,
and the relief that the pictures' brightness gives them stays below half of that. The same pictures and seed give the same
files.
"""

import argparse
import json
import random
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tqdm import trange

from megatron_moellava.commands.program import COUNT

SIZE, CARD = (96, 72), 32  # pixels of a scene, and of the side of a picture in front
PLACES = {"left": (8, 20), "right": (56, 20)}  # left and top of each
FAR, AMBIENT = 9, 15  # metres and degrees of what is behind
METRES, DEGREES = range(1, 9), range(20, 100, 5)
RELIEF = 0.4  # metres or degrees from the darkest to the brightest pixel of a picture
LOST = 0.02  # share of the pixels whose depth is not measured
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}


def scene(pictures: list[Path], rng: random.Random) -> tuple[Image.Image, np.ndarray, np.ndarray, dict]:
    """(plain picture, depth in millimetres [H, W], hundredths of a kelvin [H, W], {place: (metres, degrees)})."""
    behind, *front = (_opened(path) for path in rng.sample(pictures, 3))
    colours = ImageOps.fit(behind, SIZE)
    metres, degrees = _relief(colours, FAR), _relief(colours, AMBIENT)
    distances, temperatures = rng.sample(METRES, 2), rng.sample(DEGREES, 2)
    for picture, (left, top), far, warm in zip(front, PLACES.values(), distances, temperatures, strict=True):
        card = ImageOps.fit(picture, (CARD, CARD))
        colours.paste(card, (left, top))
        metres[top : top + CARD, left : left + CARD] = _relief(card, far)
        degrees[top : top + CARD, left : left + CARD] = _relief(card, warm)
    millimetres = np.rint(metres * 1000).astype(np.uint16)
    millimetres[np.random.default_rng(rng.getrandbits(32)).random(millimetres.shape) < LOST] = 0
    kelvin = ((degrees + 273.15) * 100).astype(np.float32)
    return colours, millimetres, kelvin, dict(zip(PLACES, zip(distances, temperatures, strict=True), strict=True))


def _opened(path: Path) -> Image.Image:
    """On white, where it is transparent."""
    image = Image.open(path).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _relief(picture: Image.Image, middle: float) -> np.ndarray:
    """`middle`, with the picture's brightness as a relief."""
    return middle + (np.asarray(picture.convert("L")) / 255 - 0.5) * RELIEF


def questions(known: dict, rng: random.Random) -> dict[str, tuple[str, str, tuple[str, ...]]]:
    """{type: (question, answer, what has to be seen for it)}"""
    (near, warm), (far, warm_right) = known["left"], known["right"]
    nearer, warmer = ("left" if near < far else "right"), ("left" if warm > warm_right else "right")
    place = rng.choice(list(PLACES))
    return {
        "nearer": ("which is nearer, left or right?", nearer, ("depth",)),
        "distance": (f"how far is the {place} one?", f"{known[place][0]} m", ("depth",)),
        "warmer": ("which is warmer, left or right?", warmer, ("thermal",)),
        "hot": (f"is the {place} one above 60 degrees?", "yes" if known[place][1] > 60 else "no", ("thermal",)),
        "both": ("is the nearer one warmer?", "yes" if nearer == warmer else "no", ("depth", "thermal")),
    }


def write(pictures: list[Path], out: Path, train: int, test: int, seed: int = 0) -> None:
    """Everything below `out`. A picture is in the scenes of one split alone."""
    rng = random.Random(seed)
    pictures = rng.sample(pictures, len(pictures))
    cut = max(3, len(pictures) // 5)
    rows, asked = [], []
    for split, count, own in (("train", train, pictures[cut:]), ("test", test, pictures[:cut])):
        for number in trange(count, desc=f"Making scenes to {split}", unit="scene", mininterval=2):
            colours, millimetres, kelvin, known = scene(own, rng)
            names = {kind: f"{kind}/{split}/{number}.{suffix}" for kind, suffix in KINDS.items()}
            for kind, content in zip(
                KINDS, (colours, Image.fromarray(millimetres), Image.fromarray(kelvin)), strict=True
            ):
                (out / "images" / names[kind]).parent.mkdir(parents=True, exist_ok=True)
                content.save(out / "images" / names[kind])
            turns = questions(known, rng)
            if split == "train":
                rows.append(row(number, names, turns, rng))
            else:
                asked += [question(number, kind, names, *turn) for kind, turn in turns.items()]
    (out / "train.json").write_text(json.dumps(rows, indent=1) + "\n")
    (out / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in asked))


KINDS = {"image": "png", "depth": "png", "thermal": "tif"}


def row(number: int, names: dict[str, str], turns: dict, rng: random.Random) -> dict:
    """A conversation about all three pictures or about one, in any order, and a turn for each question that they answer."""
    shown = rng.choice((["image", "depth", "thermal"], ["image", "depth"], ["thermal"], ["depth", "thermal"]))
    shown = rng.sample(shown, len(shown))
    fitting = [(kind, turn) for kind, turn in turns.items() if {*turn[2]} <= {*shown}]
    conversation = []
    for _, (text, answer, _) in fitting:
        conversation += [{"from": "human", "value": text}, {"from": "gpt", "value": answer}]
    conversation[0]["value"] = "".join(f"<{kind}>\n" for kind in shown) + conversation[0]["value"]
    tag = "+".join(kind for kind, _ in fitting)
    return {"id": str(number), "tag": tag, "conversations": conversation} | {kind: names[kind] for kind in shown}


def question(number: int, kind: str, names: dict[str, str], text: str, answer: str, needs: tuple[str, ...]) -> dict:
    """A line of test.jsonl: the plain picture, and what the answer has to be seen in."""
    shown = {name: names[name] for name in ("image", *needs)}
    return {"question_id": f"{number}-{kind}", "text": text, "answer": answer, "type": kind} | shown


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, required=True, help="a folder with pictures, at any depth")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--train", type=COUNT, default=4000, help="scenes to train on (4000)")
    parser.add_argument("--test", type=COUNT, default=200, help="scenes that are held out (200)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    pictures = sorted(path for path in args.pictures.rglob("*") if path.suffix.lower() in SUFFIXES)
    if len(pictures) < 6:
        parser.error(
            f"--pictures={args.pictures} holds {len(pictures)} pictures; a scene takes three of its split's, so give 6"
        )
    write(pictures, args.out, args.train, args.test, args.seed)
    print(f"{args.out}: train.json, test.jsonl and images/")


if __name__ == "__main__":
    main()
