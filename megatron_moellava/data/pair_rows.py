"""Rows of preferences -> the two samples of a pair: one conversation about the same pictures, with either answer.

A row is {"image" or "images", "prompt", "chosen", "rejected"}; LAYOUTS are those that published data sets have instead.
"""

import json
from collections.abc import Callable

from megatron_moellava.data.sample import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER, BadSample, Sample, parse_record

Content = tuple[object, object, object]  # prompt, chosen, rejected
# About the row, in RLHF-V's and LLaVA-RLHF's files.
INERT = ("ds_name", "origin_dataset", "origin_split", "idx", "image_path", "hallucination")


def _question(record: dict, origin: str) -> Content:
    return record["question"], record["chosen"], record["rejected"]


def _prompt(record: dict, origin: str) -> Content:
    return record["prompt"], record["chosen"], record["rejected"]


def _text(record: dict, origin: str) -> Content:
    """RLHF-V's field is JSON in a string."""
    content = record["text"]
    try:
        content = json.loads(content) if isinstance(content, str) else content
        return content["question"], content["chosen"], content["rejected"]
    except (ValueError, KeyError, TypeError):
        raise BadSample(
            "no pair", f"{origin}: `text` must be JSON with `question`, `chosen` and `rejected`; mend or remove the row"
        ) from None


def _outputs(record: dict, origin: str) -> Content:
    """LLaVA-RLHF's: the conversation ends with an answer that was not compared."""
    if record["preference"] not in (1, 2):
        raise BadSample("no pair", f"{origin}: `preference` is {record['preference']!r}; it must be 1 or 2")
    turns = record["conversations"]
    is_answered = isinstance(turns, list) and turns and isinstance(turns[-1], dict) and turns[-1].get("from") == "gpt"
    answers = record["output_1"], record["output_2"]
    chosen = record["preference"] - 1
    return turns[:-1] if is_answered else turns, answers[chosen], answers[1 - chosen]


LAYOUTS: dict[tuple[str, ...], Callable[[dict, str], Content]] = {
    ("prompt", "chosen", "rejected"): _prompt,
    ("question", "chosen", "rejected"): _question,  # MMPR, RLAIF-V
    ("text",): _text,  # RLHF-V
    ("conversations", "output_1", "output_2", "preference"): _outputs,  # LLaVA-RLHF
}


def parse_pair(record: dict, *, origin: str, **limits) -> tuple[Sample, Sample]:
    """(chosen, rejected) of one record: the same conversation, with either answer as its last turn. Raises BadSample.

    `limits`: as `parse_record` has them.
    """
    if not isinstance(record, dict):
        raise BadSample("not a record", f"{origin}: a row must be a JSON object, found {type(record).__name__}")
    keys = next((keys for keys in LAYOUTS if all(record.get(key) is not None for key in keys)), None)
    if keys is None:
        raise BadSample(
            "no pair",
            f"{origin}: a row of preferences has `prompt`, `chosen` and `rejected` (and `image`); this one's keys are "
            f"{', '.join(map(repr, list(record)[:8])) or 'none'}",
        )
    prompt, *answers = LAYOUTS[keys](record, origin)
    chosen, rejected = (
        _answer(answer, name, origin) for answer, name in zip(answers, ("chosen", "rejected"), strict=True)
    )
    if chosen.strip() == rejected.strip():
        raise BadSample(
            "pair without a difference", f"{origin}: chosen and rejected are the same answer; remove the row"
        )
    rest = {key: value for key, value in record.items() if key not in {*keys, *INERT}}
    turns = _turns(prompt, _num_pictures(rest), origin)
    one, other = (
        parse_record(
            {**rest, "conversations": [*turns, {"from": "gpt", "value": answer}]},
            origin=origin,
            **limits,
        )
        for answer in (chosen, rejected)
    )
    return one, other


def _answer(answer: object, name: str, origin: str) -> str:
    """Of a text, a turn, or a list of one turn."""
    if isinstance(answer, list) and len(answer) == 1:
        answer = answer[0]
    if isinstance(answer, dict):
        answer = answer.get("value", answer.get("content"))
    if not isinstance(answer, str):
        raise BadSample("malformed turn", f"{origin}: `{name}` must be a text or one turn with a text")
    if not answer.strip():
        raise BadSample("empty answer", f"{origin}: `{name}` is empty; fill it or remove the row")
    if IMAGE_PLACEHOLDER in answer:
        raise BadSample(
            "malformed turn", f"{origin}: `{name}` holds {IMAGE_PLACEHOLDER}; pictures belong to the prompt"
        )
    return answer


def _turns(prompt: object, pictures: int, origin: str) -> list:
    """The conversation before the answer; pictures that its texts do not place come first, each on its line."""
    turns = [{"from": "human", "value": prompt}] if isinstance(prompt, str) else prompt
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns) or not turns:
        raise BadSample("no conversation", f"{origin}: the prompt must be a text or a list of turns")
    turns = [
        {"from": turn.get("from", turn.get("role")), "value": turn.get("value", turn.get("content"))}
        | {key: value for key, value in turn.items() if key not in ("from", "role", "value", "content")}
        for turn in turns
    ]
    texts = [turn["value"] for turn in turns]
    is_placed = any(IMAGE_PLACEHOLDER in text or VIDEO_PLACEHOLDER in text for text in texts if isinstance(text, str))
    first = next((turn for turn in turns if turn["from"] in ("human", "user")), None)
    if first is not None and isinstance(first["value"], str) and pictures and not is_placed:
        first["value"] = f"{IMAGE_PLACEHOLDER}\n" * pictures + first["value"]
    return turns


def _num_pictures(record: dict) -> int:
    found = [record[key] for key in ("image", "images") if record.get(key)]
    return sum(len(names) if isinstance(names, list) else 1 for names in found)
