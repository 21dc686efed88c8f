"""Several things in one picture: is it there, where is it, what is there, how many are there?

One to four emoji in the quarters of a picture. Who stands beside whom is not even: the first things of the list come most
often, and half of the time a neighbour in Unicode's order (often of the same kind) keeps it company, so that POPE's popular and
adversarial polls differ from its random one. The exact box of every thing is kept in scenes_boxes.jsonl.
"""

import random
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from names import SIZE, Thing, background, llava_row, render, write_lines, write_rows

CELL = SIZE // 2
SMALLEST, LARGEST = 28, CELL
PLACES = ("top left", "top right", "bottom left", "bottom right")
COUNTS = ("one", "two", "three", "four")
NEIGHBOURS = 4  # how far in Unicode's order company is sought
NEGATION = re.compile(r"\bnot?\b")  # "no entry": a question about it would read as a negated one
POLLS = ("random", "popular", "adversarial")


@dataclass(frozen=True, slots=True)
class Placed:
    """One thing in a scene."""

    code: str
    name: str  # in English
    place: str
    box: tuple[int, int, int, int]  # left, top, right, bottom in pixels, right and bottom outside


@dataclass(frozen=True, slots=True)
class Scene:
    """A picture and all that is in it; a line of scenes_boxes.jsonl."""

    image: str
    size: int
    objects: tuple[Placed, ...]


def write_scenes(out: Path, things: list[Thing], *, train: int, test: int, seed: int = 0) -> dict[str, list]:
    """Pictures below OUT/images/scenes, scenes.json, scenes_test.jsonl and scenes_boxes.jsonl; returns what they hold.

    The pictures show the same things in both splits; no picture of one is in the other.
    """
    from tqdm import tqdm

    shown = [thing for thing in things if not NEGATION.search(thing.names["en"])]
    rng = random.Random(seed)
    scenes: list[Scene] = []
    rows, tests = [], []
    bar = tqdm(total=train + test, desc="names: composing scenes", unit=" pictures", mininterval=1)
    for split, count in (("train", train), ("test", test)):
        (out / "images" / "scenes" / split).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            image = f"scenes/{split}/{number}.png"
            picture, objects = compose(choose(shown, rng), rng)
            picture.save(out / "images" / image, compress_level=1)
            scene = Scene(image, SIZE, objects)
            asked = questions(scene, shown, rng)
            if split == "train":
                rows.append(_row(scene, asked, rng))
            else:
                tests += [
                    {"question_id": f"{image}-{n}", "image": image, "question": q, "answer": a, "type": kind}
                    for n, (q, a, kind) in enumerate(asked)
                ]
            scenes.append(scene)
            bar.update()
    bar.close()
    write_rows(out / "scenes.json", rows)
    write_lines(out / "scenes_test.jsonl", tests)
    write_lines(out / "scenes_boxes.jsonl", [asdict(scene) for scene in scenes])
    return {"rows": rows, "tests": tests, "scenes": scenes}


def choose(things: list[Thing], rng: random.Random) -> list[Thing]:
    """One to four different things: frequent ones more often, and company that is a neighbour half of the time."""
    count = rng.randint(1, min(len(PLACES), len(things)))
    chosen: list[int] = []
    while len(chosen) < count:
        if chosen and rng.random() < 0.5:
            index = chosen[-1] + rng.randint(-NEIGHBOURS, NEIGHBOURS)
        else:
            index = int(len(things) * rng.random() ** 2)  # the first tenth comes three times as often as the average
        if 0 <= index < len(things) and index not in chosen:
            chosen.append(index)
    return [things[index] for index in chosen]


def compose(things: list[Thing], rng: random.Random):
    """(picture, what is in it): every thing in a quarter of its own, its box that of the pixels it colours."""
    from PIL import Image, ImageChops

    empty = Image.new("RGB", (SIZE, SIZE), background(rng))
    canvas = empty.copy()
    objects = []
    for thing, quarter in zip(things, rng.sample(range(len(PLACES)), len(things)), strict=True):
        size = rng.randint(SMALLEST, LARGEST)
        drawing = render(thing.svg, size)
        corner = (quarter % 2 * CELL, quarter // 2 * CELL)
        alone = empty.copy()
        alone.paste(drawing, tuple(start + rng.randint(0, CELL - size) for start in corner), drawing)
        box = ImageChops.difference(alone, empty).getbbox() or (*corner, corner[0] + CELL, corner[1] + CELL)
        canvas.paste(alone.crop(box), box)
        objects.append(Placed(thing.code, thing.names["en"], PLACES[quarter], box))
    return canvas, tuple(objects)


def questions(scene: Scene, things: list[Thing], rng: random.Random) -> list[tuple[str, str, str]]:
    """(question, answer, type): existence as often yes as no for each of POPE's ways to choose what is absent."""
    here = [placed.name for placed in scene.objects]
    asked = [("how many things are there?", COUNTS[len(here) - 1], "scene count")]
    asked += [(f"is there {article(name)} {name}?", "yes", "scene existence") for name in here]
    asked += [(f"is there {article(name)} {name}?", "no", "scene existence") for name in absent(scene, things, rng)]
    for placed in scene.objects:
        asked.append((f"where is the {placed.name}?", placed.place, "scene position"))
        asked.append((f"what is at the {placed.place}?", placed.name, "scene name"))
    return asked


def absent(scene: Scene, things: list[Thing], rng: random.Random) -> list[str]:
    """Things that are not there: as many as are there at random, of the frequent ones, and of the neighbours."""
    here = {placed.code for placed in scene.objects}
    position = {thing.code: index for index, thing in enumerate(things)}
    frequent = things[: max(len(PLACES) * 2, len(things) // 10)]
    beside = [
        things[index]
        for code in sorted(here)
        for index in range(max(0, position[code] - NEIGHBOURS), min(len(things), position[code] + NEIGHBOURS + 1))
    ]
    names: list[str] = []
    for pool in (things, frequent, beside):
        free = sorted({thing.names["en"] for thing in pool if thing.code not in here} - set(names))
        names += rng.sample(free, min(len(here), len(free)))
    return names


def article(name: str) -> str:
    """a or an"""
    return "an" if name[0] in "aeiou" else "a"


def _row(scene: Scene, asked: list[tuple[str, str, str]], rng: random.Random) -> dict:
    """A conversation of up to five turns, yes and no equally often among them."""
    yes = [turn for turn in asked if turn[1] == "yes"]
    no = [turn for turn in asked if turn[1] == "no"]
    other = [turn for turn in asked if turn[1] not in ("yes", "no")]
    turns = [rng.choice(yes), rng.choice(no), *rng.sample(other, 3)]
    rng.shuffle(turns)
    pairs = [(question, answer) for question, answer, _ in turns]
    return llava_row(scene.image, pairs, 0, "+".join(kind for *_, kind in turns))
