"""Questions with lettered options about several pictures or a video, as their benchmarks publish them.

BLINK, MuirBench, Video-MME and MVBench name the same things differently; FIELDS says how. Pictures are names of files or, in
Parquet, their content. A text that holds `<image>` says itself where its pictures belong; otherwise they go first.
"""

import base64
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_moellava.config import DataError
from megatron_moellava.data.bad_sample import BadSample
from megatron_moellava.data.rows import stored_rows
from megatron_moellava.evaluation.questions import Picture, Question

FIELDS = {  # what is wanted -> the names that it has; the first that a row has counts
    "id": ("question_id", "idx", "id"),
    "options": ("options", "choices", "candidates"),
    "pictures": ("image_list", "images", "image"),
    "video": ("video", "videoID"),
    "group": ("task_type", "sub_task", "task", "category"),
}
NUMBERED = tuple(f"image_{number}" for number in range(1, 17))  # BLINK's pictures, each in a field of its own
LETTERS = "ABCDEFGHIJ"
VIDEO_ENDING = ".mp4"  # of names without one
# MVBench's videos lie in the folders of the data sets that they come from: name of a file of questions -> folder.
MVBENCH_FOLDERS = {
    "action_antonym": "ssv2_video",
    "action_count": "perception/videos",
    "action_localization": "sta/sta_video",
    "action_prediction": "star/Charades_v1_480",
    "action_sequence": "star/Charades_v1_480",
    "character_order": "perception/videos",
    "counterfactual_inference": "clevrer/video_validation",
    "egocentric_navigation": "vlnqa",
    "episodic_reasoning": "tvqa/frames_fps3_hq",
    "fine_grained_action": "Moments_in_Time_Raw/videos",
    "fine_grained_pose": "nturgbd",
    "moving_attribute": "clevrer/video_validation",
    "moving_count": "clevrer/video_validation",
    "moving_direction": "clevrer/video_validation",
    "object_existence": "clevrer/video_validation",
    "object_interaction": "star/Charades_v1_480",
    "object_shuffle": "perception/videos",
    "scene_transition": "scene_qa/video",
    "state_change": "perception/videos",
    "unexpected_action": "FunQA_test/test",
}
FRAMES_RATE = {"episodic_reasoning": 3.0}  # pictures per second, where its videos are folders of frames


def read_choices(questions: Path, images: Path) -> list[Question]:
    """{"question", options, answer, pictures or video} a row; of a folder, the rows of all its JSON files.

    Raises DataError for a row that lacks one of them, or whose answer is none of its options.
    """
    files = sorted(questions.glob("*.json")) if questions.is_dir() else [questions]
    asked: list[Question] = []
    for file in files:
        own = images / MVBENCH_FOLDERS.get(file.stem, "")
        folder = own if questions.is_dir() and own.is_dir() else images
        rate = FRAMES_RATE.get(file.stem) if questions.is_dir() else None
        for number, row in stored_rows(file):
            if isinstance(row, BadSample):
                raise row
            where = f"{file} row {number}"
            group = _find(row, "group") or (file.stem if questions.is_dir() else "")
            id_ = _find(row, "id")
            asked.append(_question(row, len(asked) if id_ is None else id_, str(group), folder, rate, where))
    return asked


def _find(row: Mapping, what: str) -> Any:
    return next((row[name] for name in FIELDS[what] if row.get(name) is not None), None)


def _question(row: Mapping, id: int | str, group: str, images: Path, rate: float | None, where: str) -> Question:
    options = _options(_find(row, "options"), where)
    text = row.get("question")
    if not isinstance(text, str):
        raise DataError(f"{where}: `question` must be text; the row has {sorted(map(str, row))}")
    listed = "".join(f"\n{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))
    pictures = (*_pictures(row, images, where), *_videos(row, images, rate, where))
    return Question(
        id=id if isinstance(id, int | str) else str(id),
        text=text + listed,
        picture=pictures[0] if pictures else None,
        more=pictures[1:],
        fields={"options": options, "truth": _letter(row.get("answer"), options, where), "group": group},
    )


def _options(value: Any, where: str) -> list[str]:
    """The options without the letters that some files put in front ("A. a cat", "(A) a cat")."""
    value = json.loads(value) if isinstance(value, str) and value.startswith("[") else value
    if not isinstance(value, list) or not 2 <= len(value) <= len(LETTERS) or not all(isinstance(v, str) for v in value):
        raise DataError(
            f"{where}: needs 2 to {len(LETTERS)} options in {' or '.join(FIELDS['options'])}, found {value!r:.80}"
        )
    marks = [(f"{letter}. ", f"{letter}) ", f"({letter}) ") for letter in LETTERS]
    if all(option.startswith(mark) for option, mark in zip(value, marks, strict=False)):
        return [option.split(" ", 1)[1].strip() for option in value]
    return value


def _letter(answer: Any, options: list[str], where: str) -> str:
    """Of "B", "(B)", the option's text, or its number."""
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(options):
        return LETTERS[answer]
    letter = str(answer).strip().strip("().")
    if len(letter) == 1 and letter in LETTERS[: len(options)]:
        return letter
    if answer in options:
        return LETTERS[options.index(answer)]
    raise DataError(f"{where}: the answer {answer!r} is none of the options {options}")


def _pictures(row: Mapping, images: Path, where: str) -> Iterator[Picture]:
    given = [row[name] for name in NUMBERED if row.get(name)] or _find(row, "pictures") or []
    for entry in given if isinstance(given, list) else [given]:
        name = (entry.get("bytes") or entry.get("path")) if isinstance(entry, dict) else entry
        if not isinstance(name, str):
            raise DataError(f"{where}: a picture must be a file's name or its content, not {entry!r:.80}")
        if name.startswith("data:"):
            yield Picture(data=base64.b64decode(name.partition(",")[2]))
        else:
            yield Picture(path=images / name)


def _videos(row: Mapping, images: Path, rate: float | None, where: str) -> Iterator[Picture]:
    name = _find(row, "video")
    if name is None:
        return
    if not isinstance(name, str):
        raise DataError(f"{where}: `video` must be a file's name, not {name!r:.80}")
    path = images / name
    path = path if path.suffix or path.is_dir() else path.with_name(path.name + VIDEO_ENDING)
    start, end = row.get("start"), row.get("end")
    span = None if start is None or end is None else (float(start), float(end))
    yield Picture(path=path, video=True, span=span, rate=rate if path.is_dir() else None)


CHOICE_READERS = {"choices": read_choices}
