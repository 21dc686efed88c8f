"""Texts that a judge reads: LLaVA-Bench in the wild (ten-point reviews of two answers) and MM-Vet (0.0 to 1.0).

The wording given to the judge is part of the benchmark. Where the benchmark's own wording is published as a file (see
the task's files) it is read from the data folder; without the file, our wording below is used, and the note on the
score says so. Reviews are kept one a line in the run's folder, so that an interrupted run pays for no answer twice; a
review is used again only for the same judge and the same words.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_moellava.config import DataError
from megatron_moellava.evaluation.answered import Answered
from megatron_moellava.evaluation.judge import Judge
from megatron_moellava.evaluation.metrics import Score, mean_percent
from megatron_moellava.evaluation.predictions import drop_torn_line
from megatron_moellava.evaluation.questions import Question, read_json, read_jsonl

LLAVA_BENCH_JUDGE = "gpt-3.5-turbo"  # the released script's; the paper's LLaVA-1.5 rows come from another
MM_VET_JUDGE = "gpt-4-0613"
_REVIEW_SYSTEM = "You are a helpful and precise assistant for checking the quality of the answer."
_REVIEW_TEMPERATURE, _REVIEW_TOKENS = 0.2, 1024
_GRADE_TOKENS = 3
_GRADE_TRIES = 5  # the original asks a sixth time and then scores 0 without reading the reply
_OUR_REVIEW_RULE = {
    "role": "Assistant",
    "prompt": (
        "Two assistants answered the question above about a picture that you cannot see; the context describes it. "
        "Rate both answers for helpfulness, relevance, accuracy and level of detail, each with one number, 1 to 10, "
        "higher is better. Write the two numbers, separated by a blank, first Assistant 1, then Assistant 2, on the "
        "first line and nothing else there. Explain on the lines below, and do not let the order of the answers count."
    ),
}
_OUR_GRADE_PROMPT = """\
Grade a prediction against the ground truth of a question about a picture. The grade is a number from 0.0 (wrong) to \
1.0 (right) in steps of 0.1. Parts of the ground truth joined by <AND> must all be in the prediction; of parts joined \
by <OR> one is enough. Fill in the last cell of the table with the grade alone.

Question | Ground truth | Prediction | Grade
--- | --- | --- | ---
Which fruits lie on the table? | apple <AND> pear | A red apple. | 0.5
Which fruits lie on the table? | apple <AND> pear | An apple and a pear. | 1.0
What is the man holding? | umbrella <OR> parasol | He holds a parasol. | 1.0
What is the man holding? | umbrella <OR> parasol | A walking stick. | 0.0
"""


@dataclass(slots=True)
class Reviews:
    """What the judge has said so far, one JSON object a line; keyed by a digest of judge, question and words."""

    path: Path
    done: dict[str, dict]

    @classmethod
    def load(cls, path: Path) -> "Reviews":
        """What an earlier run has kept in `path`, without a last line that was cut off."""
        drop_torn_line(path)
        rows = read_jsonl(path) if path.exists() else ()
        return cls(path, {row["key"]: row for row in rows})

    def get(self, key: str, make: Callable[[], dict]) -> dict:
        """The review under `key`; where there is none, `make` is called and its result kept."""
        if key not in self.done:
            self.done[key] = {"key": key} | make()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(self.done[key], ensure_ascii=False) + "\n")
        return self.done[key]


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def _judge_note(judge: Judge, models: Iterable[str], original: str, wording: str) -> str:
    names = ", ".join(sorted(set(models)))
    comparable = "" if names == original else f"; the original used {original}: not comparable with its numbers"
    return f"judge {names} at {judge.host}, {wording} wording{comparable}"


def llava_bench(answered: Answered) -> Score | None:
    """100 * mean review of the model / mean review of the GPT-4 reference, over all and per category.

    A review whose first line is not two numbers counts as (-1, -1), as in the original; the details count them and give
    the score without them.
    """
    if answered.judge is None:
        return None
    contexts = {row["image"]: row["caption"] for row in read_jsonl(answered.folder / "context.jsonl")}
    references = {str(row["question_id"]): row["text"] for row in read_jsonl(answered.folder / "answers_gpt4.jsonl")}
    rule_path = answered.folder / "rule.json"
    rules = read_json(rule_path) if rule_path.exists() else None
    reviews = Reviews.load(answered.work / "reviews.jsonl")
    rows = []
    for question, text in answered:
        category = f"llava_bench_{question.fields['category']}"
        words = _review_words(question, text, contexts, references, _rule_of(rules, category, rule_path))
        key = _digest(answered.judge.url, answered.judge.model, str(question.id), words)
        make = _Review(answered.judge, words, question.id, category)
        rows.append(reviews.get(key, make))
    return _llava_bench_score(rows, answered.judge, "the original's" if rules else "our")


def _rule_of(rules: object, category: str, path: Path) -> Mapping[str, str]:
    if rules is None:
        return _OUR_REVIEW_RULE
    if not isinstance(rules, dict) or category not in rules:
        raise DataError(f"{path} has no rule {category!r}; fetch the rule file of LLaVA's evaluation again")
    return rules[category]


def _review_words(question: Question, text: str, contexts: Mapping, references: Mapping, rule: Mapping) -> str:
    caption = contexts[question.fields["image"]]
    role, instruction = rule["role"], rule["prompt"]
    answers = (references[str(question.id)], text)
    shown = "".join(
        f"[{role} {number}]\n{answer}\n\n[End of {role} {number}]\n\n" for number, answer in enumerate(answers, start=1)
    )
    context = "\n".join(caption) if isinstance(caption, list) else caption
    return f"[Context]\n{context}\n\n[Question]\n{question.text}\n\n{shown}[System]\n{instruction}\n\n"


@dataclass(frozen=True, slots=True)
class _Review:
    judge: Judge
    words: str
    question_id: int | str
    category: str

    def __call__(self) -> dict:
        messages = [{"role": "system", "content": _REVIEW_SYSTEM}, {"role": "user", "content": self.words}]
        reply = self.judge.ask(messages, temperature=_REVIEW_TEMPERATURE, max_tokens=_REVIEW_TOKENS)
        row = {"question_id": self.question_id, "category": self.category, "content": reply.text, "judge": reply.model}
        return row | {"tuple": read_review(reply.text)}


def read_review(review: str) -> list[float]:
    """`"8 7.5\\nBecause..."` -> [8.0, 7.5]; the first line must be two numbers with one blank or comma between them."""
    parts = review.split("\n")[0].replace(",", " ").split(" ")
    try:
        first, second = map(float, parts)
    except ValueError:
        return [-1.0, -1.0]
    return [first, second]


def _relative(sums_K: np.ndarray) -> float:
    return float(100.0 * sums_K[1] / sums_K[0]) if sums_K[0] else 0.0


def _llava_bench_score(rows: list[dict], judge: Judge, wording: str) -> Score:
    sums_UK = np.array([row["tuple"] for row in rows], dtype=np.float64)
    readable = sums_UK[:, 0] >= 0
    categories: dict[str, list[list[float]]] = defaultdict(list)
    for row in rows:
        categories[row["category"]].append(row["tuple"])
    return Score(
        metric="relative to the GPT-4 reference (%)",
        sums_UK=sums_UK,
        headline=_relative,
        count=len(rows),
        unit="question",
        details={name: _relative(np.array(part).sum(axis=0)) for name, part in sorted(categories.items())}
        | {"unreadable reviews": int((~readable).sum()), "without them": _relative(sums_UK[readable].sum(axis=0))},
        notes=[_judge_note(judge, (row["judge"] for row in rows), LLAVA_BENCH_JUDGE, wording)],
    )


def mm_vet(answered: Answered) -> Score | None:
    """Mean grade times 100, over all and per capability. One run at temperature 0, as in the original.

    Raises DataError when the files are of different releases.
    """
    if answered.judge is None:
        return None
    truths = read_json(answered.folder / "mm-vet.json")
    prompt_path = answered.folder / "grader_prompt.txt"
    prompt = prompt_path.read_text(encoding="utf-8") if prompt_path.exists() else _OUR_GRADE_PROMPT
    reviews = Reviews.load(answered.work / "grades.jsonl")
    rows = []
    capabilities: dict[str, list[float]] = defaultdict(list)
    for question, text in answered:
        truth = truths.get(f"v1_{question.id}")
        if truth is None:
            raise DataError(f"mm-vet.json has no item v1_{question.id}; the files are of different releases")
        references = truth["answer"].replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
        words = prompt + "\n" + " | ".join([truth["question"], references, text, ""])
        key = _digest(answered.judge.url, answered.judge.model, str(question.id), words)
        rows.append(reviews.get(key, _Grade(answered.judge, words, question.id)))
        for capability in set(truth["capability"]):
            capabilities[capability].append(rows[-1]["score"])
    wording = "the original's" if prompt_path.exists() else "our"
    return Score(
        metric="mean grade (%)",
        sums_UK=np.array([(row["score"], 1.0) for row in rows]),
        headline=mean_percent,
        count=len(rows),
        unit="question",
        details={name: 100.0 * sum(part) / len(part) for name, part in sorted(capabilities.items())}
        | {"unreadable grades": sum(row["unreadable"] for row in rows)},
        notes=[
            _judge_note(answered.judge, (row["judge"] for row in rows), MM_VET_JUDGE, wording),
            *answered.note_subset(len(truths)),
        ],
    )


@dataclass(frozen=True, slots=True)
class _Grade:
    """Up to five tries: the second one adds a plea for a digit, each later one 0.5 of temperature; then 0.0."""

    judge: Judge
    words: str
    question_id: int | str

    def __call__(self) -> dict:
        for attempt in range(_GRADE_TRIES):
            plea = "\nPredict the correctness of the answer (digit): " if attempt else ""
            reply = self.judge.ask(
                [{"role": "user", "content": self.words + plea}],
                temperature=0.5 * max(0, attempt - 1),
                max_tokens=_GRADE_TOKENS,
            )
            score = read_grade(reply.text)
            if score is not None:
                break
        row = {"question_id": self.question_id, "content": reply.text, "judge": reply.model}
        return row | {"score": score or 0.0, "unreadable": score is None}


def read_grade(text: str) -> float | None:
    """The number before the first blank, if it lies in 0.0 to 1.0."""
    try:
        score = float(text.split(" ")[0].strip())
    except ValueError:
        return None
    return score if 0.0 <= score <= 1.0 else None
