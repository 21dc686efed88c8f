"""Compositions of scikit-learn's 1,797 real handwritten digits: one to three coloured digits side by side.

Train and test use different digits. Questions ask identity, colour, count, position and (yes and no equally often)
existence.
"""

import random
from pathlib import Path
from typing import NamedTuple

from PIL import Image

SIZE = 64  # pixels of an image
COLORS = {
    "black": (20, 20, 20),
    "blue": (30, 60, 220),
    "green": (20, 140, 40),
    "red": (210, 30, 30),
    "brown": (130, 80, 30),
    "teal": (0, 130, 130),
}
COUNTS = ("one", "two", "three")
PLACES = {1: ("middle",), 2: ("left", "right"), 3: ("left", "middle", "right")}
NUM_IMAGES = {"train": 4000, "test": 1000}
TEST_SHARE = 0.2  # of the digits


class Digit(NamedTuple):
    index: int  # in scikit-learn's set
    value: int
    color: str
    place: str


def write_digits(out: Path, rng: random.Random):
    """(train questions as (image, question, answer, type), caption rows, test rows), images written below OUT."""
    from sklearn.datasets import load_digits
    from tqdm import tqdm

    data = load_digits()
    order = list(range(len(data.images)))
    rng.shuffle(order)
    cut = int(len(order) * TEST_SHARE)
    pools = {"test": order[:cut], "train": order[cut:]}
    questions, captions, tests = [], [], []
    for split, pool in pools.items():
        folder = out / "images" / "digits" / split
        folder.mkdir(parents=True, exist_ok=True)
        for number in tqdm(range(NUM_IMAGES[split]), desc=f"digits {split} images", unit=""):
            name = f"digits/{split}/{number}.png"
            scene = _scene(pool, data.target, rng)
            _draw(scene, data.images, rng).save(folder / f"{number}.png")
            asked = _questions(scene, rng)
            if split == "train":
                questions += [(name, *question) for question in asked]
                captions.append(_caption(name, number, scene))
            else:
                tests += [
                    {"question_id": f"{name}-{n}", "image": name, "question": q, "answer": a, "type": f"digits {t}"}
                    for n, (q, a, t) in enumerate(asked)
                ]
    return questions, captions, tests


def _scene(pool: list[int], values, rng: random.Random) -> list[Digit]:
    """From left to right; values and colours differ within a scene."""
    count = rng.randint(1, 3)
    chosen: list[int] = []
    while len(chosen) < count:
        index = rng.choice(pool)
        if all(values[index] != values[other] for other in chosen):
            chosen.append(index)
    colors = rng.sample(sorted(COLORS), count)
    return [Digit(i, int(values[i]), c, p) for i, c, p in zip(chosen, colors, PLACES[count], strict=True)]


def _draw(scene: list[Digit], images, rng: random.Random) -> Image.Image:
    canvas = Image.new("RGB", (SIZE, SIZE), (235, 235, 235))
    width, height = 20, 28
    for slot, digit in enumerate(scene):
        ink = Image.fromarray((images[digit.index] * 15.9375).astype("uint8"))  # 0..16 -> 0..255
        ink = ink.resize((width, height), Image.Resampling.BICUBIC)
        left = SIZE * (2 * slot + 1) // (2 * len(scene)) - width // 2 + rng.randint(-1, 1)
        top = (SIZE - height) // 2 + rng.randint(-12, 12)
        canvas.paste(COLORS[digit.color], (left, top), ink)
    return canvas


def _questions(scene: list[Digit], rng: random.Random) -> list[tuple[str, str, str]]:
    """(question, answer, type)"""
    one = rng.choice(scene)
    absent = rng.choice([value for value in range(10) if all(value != digit.value for digit in scene)])
    missing = rng.choice([color for color in COLORS if all(color != digit.color for digit in scene)])
    asked = [
        ("how many digits are there?", COUNTS[len(scene) - 1], "count"),
        (f"what is the {one.color} digit?", str(one.value), "identity"),
        (f"what color is the {one.value}?", one.color, "color"),
        (f"is there a {one.value}?", "yes", "existence"),
        (f"is there a {absent}?", "no", "existence"),
        (f"is there a {one.color} digit?", "yes", "existence"),
        (f"is there a {missing} digit?", "no", "existence"),
    ]
    if len(scene) > 1:
        asked.append((f"where is the {one.value}?", one.place, "position"))
        asked.append((f"which digit is on the {scene[0].place}?", str(scene[0].value), "position"))
    return asked


def _caption(name: str, number: int, scene: list[Digit]) -> dict:
    text = " and ".join(f"a {digit.color} {digit.value}" for digit in scene)
    turns = [{"from": "human", "value": "<image>\ndescribe the image."}, {"from": "gpt", "value": f"{text}."}]
    return {"id": f"digits-train-{number}", "image": name, "conversations": turns}
