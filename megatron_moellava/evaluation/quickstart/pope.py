"""POPE's protocol on the quickstart's pictures: does the model see what is not there?

POPE asks of every picture whether some objects are in it: those that are, and equally many that are not, chosen in three
ways: at random, the most frequent ones of the whole set, and those that most often stand beside what the picture shows.
The quickstart's own existence questions are no such poll, because half of them are negated ("is there not a circle?")
and far more are about absent things. What a picture holds is taken from the answers to its own test questions, so that
nothing is asked whose truth is not known.
"""

import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_moellava.evaluation.questions import Picture, Question, field_of, read_jsonl
from megatron_moellava.evaluation.quickstart.metrics import is_existence, normalise
from megatron_moellava.evaluation.scorers.yes_no import POPE_CATEGORIES

# "does the image not contain a red shape?", "is no circle present?" -> the object
_OBJECT = re.compile(r"\b(?:an?|no) ((?:(?!\bnot?\b).)+?)(?: present| in the image)?\?$")
_NEGATED = re.compile(r"\bnot?\b")


@dataclass(slots=True)
class Scene:
    """A picture with the objects that its own questions say are, or are not, in it."""

    image: str
    present: set[str] = field(default_factory=set)
    absent: set[str] = field(default_factory=set)


def read_quickstart_pope(questions: Path, images: Path) -> list[Question]:
    """`question_id`: the number of the question; the fields hold `image`, `category` and the truth, `answer`."""
    polls = polls_of(read_scenes(read_jsonl(questions), questions))
    return [
        Question(
            id=number,
            text=f"is there a {thing}?",
            picture=Picture(path=images / scene.image),
            fields={"image": scene.image, "category": category, "answer": answer},
        )
        for number, (scene, thing, category, answer) in enumerate(polls)
    ]


def read_scenes(rows: Iterable[Mapping], path: Path) -> list[Scene]:
    """What the existence questions about each picture say that it holds and does not hold, in order of appearance."""
    scenes: dict[str, Scene] = {}
    for row in rows:
        image, kind = str(field_of(row, "image", path)), field_of(row, "type", path)
        scene = scenes.setdefault(image, Scene(image))
        named = _OBJECT.search(str(field_of(row, "question", path)).lower())
        if is_existence(kind) and named:
            is_there = (normalise(row["answer"]) == "yes") != bool(_NEGATED.search(row["question"].lower()))
            (scene.present if is_there else scene.absent).add(named.group(1))
    return list(scenes.values())


def polls_of(scenes: Sequence[Scene]) -> list[tuple[Scene, str, str, str]]:
    """(picture, object, category, "yes" or "no") of all categories; an object may be asked about in several."""
    return [poll for category in POPE_CATEGORIES for poll in _polls(scenes, category)]


def _polls(scenes: Sequence[Scene], category: str) -> Iterable[tuple[Scene, str, str, str]]:
    """(picture, object, category, "yes" or "no"): as many of either, as far as the picture's own questions reach."""
    kinds: dict[str, list[Scene]] = defaultdict(list)  # easy-VQA's shapes are never asked of digits
    for scene in scenes:
        kinds[scene.image.split("/")[0]].append(scene)
    for group in kinds.values():
        frequency = Counter(thing for scene in group for thing in scene.present)
        together = Counter(
            (here, thing) for scene in group for here in scene.present for thing in scene.present if here != thing
        )
        for scene in group:
            count = min(len(scene.present), len(scene.absent))
            missing = _ranked(scene, category, frequency, together)[:count]
            yield from ((scene, thing, category, "yes") for thing in sorted(scene.present)[:count])
            yield from ((scene, thing, category, "no") for thing in missing)


def _ranked(scene: Scene, category: str, frequency: Counter, together: Counter) -> list[str]:
    """Absent objects, those to ask for first; equal ones in the order of a draw that depends on the picture alone."""
    drawn = sorted(scene.absent)
    random.Random(scene.image).shuffle(drawn)
    if category == "popular":
        return sorted(drawn, key=lambda thing: -frequency[thing])
    if category == "adversarial":
        return sorted(drawn, key=lambda thing: -sum(together[here, thing] for here in scene.present))
    return drawn
