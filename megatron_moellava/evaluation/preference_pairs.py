"""Pairs of a model's own answers, the better one chosen: rows of stage 4 (data/pair_rows.py) from conversations.

Each answer of a row becomes a question: the turns before it are the prompt, and it is the truth. The model answers
several times at a temperature; a scorer ranks what it said, and where the best and the worst differ in score they are a
pair. Of answers with the same score the most frequent stands for all: it is what the model is likeliest to say.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_moellava.config import ConfigError, DataError
from megatron_moellava.data.sample import IMAGE_PLACEHOLDER, BadSample, ImageRef, Sample, Turn, parse_record
from megatron_moellava.evaluation.judge import Judge, JudgeError
from megatron_moellava.evaluation.metrics import answers_yes
from megatron_moellava.evaluation.quickstart.metrics import normalise
from megatron_moellava.evaluation.quickstart.pope import Scene, polls_of, read_scenes

FROM = {"user": "human", "assistant": "gpt"}
YES_OR_NO = ("yes", "no")
GRADE_TOKENS = 8
GRADE_PROMPT = """\
Grade an answer to a question about a picture that you cannot see. The reference is true. A statement about the picture \
that the reference contradicts is worse than one that is missing. Reply with one number from 0 (wrong) to 10 (right) and \
nothing else.

Question: {question}
Reference: {truth}
Answer: {answer}
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """A question to the model, with what is known to be true."""

    id: str
    turns: tuple[Turn, ...]  # the last one is the user's
    images: tuple[ImageRef, ...]
    truth: str


Scorer = Callable[[Asked, str], float | None]  # None: the answer cannot be read


def exact(asked: Asked, answer: str) -> float:
    """1 for the truth, whatever its case and its full stop."""
    return float(normalise(answer) == normalise(asked.truth))


def poll(asked: Asked, answer: str) -> float | None:
    """1 for a yes or no that is right, None for an answer that is neither. DataError for a truth that is neither.

    POPE takes every answer without a no for a yes; chosen as one, words that mean nothing would be learnt.
    """
    truth = normalise(asked.truth)
    if truth not in YES_OR_NO:
        raise DataError(f"{asked.id}: a poll asks for yes or no, and the truth is {asked.truth!r}; use --scorer exact")
    said_yes = answers_yes(answer.lower())
    if said_yes and "yes" not in re.findall(r"\w+", answer.split(".")[0].lower()):
        return None
    return float(said_yes == (truth == "yes"))


def judged(judge: Judge) -> Scorer:
    """0 to 10, as the judge grades an answer beside the truth. JudgeError where it does not say a number."""

    def score(asked: Asked, answer: str) -> float:
        question = asked.turns[-1].text.replace(IMAGE_PLACEHOLDER, "").strip()
        content = GRADE_PROMPT.format(question=question, truth=asked.truth, answer=answer)
        reply = judge.ask([{"role": "user", "content": content}], temperature=0.0, max_tokens=GRADE_TOKENS)
        found = re.search(r"\d+(\.\d+)?", reply.text)
        if found is None:
            raise JudgeError(f"judge.model={reply.model} graded {asked.id} with {reply.text!r}; it must be a number")
        return min(float(found.group()), 10.0)

    return score


def scorer_of(name: str, judge: Judge | None) -> Scorer:
    """By the name of --scorer. ConfigError for a judge that is not named, or one that nobody asks."""
    if (name == "judge") != (judge is not None):
        raise ConfigError("--scorer judge goes together with --judge-url and --judge-model: give all three or none")
    without_judge: dict[str, Scorer] = {"exact": exact, "poll": poll}
    return judged(judge) if judge is not None else without_judge[name]


# --- questions --------------------------------------------------------------------------------------------------------


def questions_of(rows: Iterable[tuple[int, dict | BadSample]], name: str, limit: int = 0) -> list[Asked]:
    """Every answered turn of the rows of a file `name`, the first `limit` of them.

    Raises BadSample for a bad row, and for one with more than pictures and turns.
    """
    found: list[Asked] = []
    for number, record in rows:
        found += _turns_of(_parsed(record, f"{name} row {number}"))
        if limit and len(found) >= limit:
            break
    return found[: limit or None]


def polls(rows: Iterable[tuple[int, dict | BadSample]], name: str, limit: int = 0) -> list[Asked]:
    """POPE's protocol on the rows' pictures ("is there a circle?"), by what their own yes-or-no questions say of them."""
    asked = [(sample, question) for sample, question in _with_samples(rows, name) if len(sample.images) == 1]
    facts = [
        {
            "image": sample.images[0].name,
            "type": "existence" if normalise(question.truth) in YES_OR_NO else "other",
            "question": question.turns[-1].text.replace(IMAGE_PLACEHOLDER, "").strip(),
            "answer": question.truth,
        }
        for sample, question in asked
    ]
    pictures = {sample.images[0].name: sample.images for sample, _ in asked}
    unique: dict[tuple[str, str], Asked] = {}
    for scene, thing, _, truth in polls_of(read_scenes(facts, Path(name))):
        unique.setdefault((scene.image, thing), _poll_of(scene, thing, truth, pictures[scene.image]))
    return list(unique.values())[: limit or None]


def _poll_of(scene: Scene, thing: str, truth: str, images: tuple[ImageRef, ...]) -> Asked:
    turns = (Turn(role="user", text=f"{IMAGE_PLACEHOLDER}\nis there a {thing}?"),)
    return Asked(id=f"{scene.image} {thing}", turns=turns, images=images, truth=truth)


def _with_samples(rows: Iterable[tuple[int, dict | BadSample]], name: str) -> Iterator[tuple[Sample, Asked]]:
    for number, record in rows:
        sample = _parsed(record, f"{name} row {number}")
        yield from ((sample, question) for question in _turns_of(sample))


def _parsed(record: dict | BadSample, origin: str) -> Sample:
    if isinstance(record, BadSample):
        raise record
    sample = parse_record(record, origin=origin)
    lost = {
        "a video": any(image.frame is not None for image in sample.images),
        "boxes, points or polygons": bool(sample.regions),
        "a system prompt": bool(sample.system),
    }
    if found := [name for name, there in lost.items() if there]:
        raise BadSample("not for pairs", f"{origin}: has {found[0]}, which the pair would not have; leave the row out")
    return sample


def _turns_of(sample: Sample) -> Iterator[Asked]:
    for place, turn in enumerate(sample.turns):
        if turn.role == "assistant" and turn.text.strip():
            before = sample.turns[:place]
            pictures = sum(other.text.count(IMAGE_PLACEHOLDER) for other in before) if sample.images else 0
            yield Asked(id=f"{sample.id}/{place}", turns=before, images=sample.images[:pictures], truth=turn.text)


# --- pairs ------------------------------------------------------------------------------------------------------------


def pair_of(asked: Asked, answers: Sequence[str], scorer: Scorer, with_truth: bool = False) -> tuple[dict | None, int]:
    """(a row of stage 4, or None where no answer is better than another; how many of `answers` the scorer cannot read).

    `with_truth`: the truth is among the answers, so that a model that is never right learns from its mistakes too.
    """
    counts = Counter(answer for answer in answers if answer.strip())
    if with_truth:
        counts.setdefault(asked.truth, 0)
    read = {answer: scorer(asked, answer) for answer in counts}
    scores = {answer: score for answer, score in read.items() if score is not None}
    unclear = sum(counts[answer] for answer, score in read.items() if score is None)
    if not scores or min(scores.values()) == max(scores.values()):
        return None, unclear
    chosen, rejected = (
        max((answer for answer in scores if scores[answer] == bound), key=lambda answer: counts[answer])
        for bound in (max(scores.values()), min(scores.values()))
    )
    prompt = [{"from": FROM[turn.role], "value": turn.text} for turn in asked.turns]
    images = {"images": [image.name for image in asked.images]} if asked.images else {}
    return {"id": asked.id} | images | {"prompt": prompt, "chosen": chosen, "rejected": rejected}, unclear
