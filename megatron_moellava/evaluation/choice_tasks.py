"""Benchmarks of several pictures and of videos, with lettered options. The original has none."""

from megatron_moellava.evaluation.scorers import choice
from megatron_moellava.evaluation.task import OPTION_SUFFIX, Task


def _lettered(name: str, title: str, folder: str, questions: str, images: str, origin: str) -> Task:
    return Task(
        name=name,
        title=title,
        folder=folder,
        questions=questions,
        reader="choices",
        images=images,
        suffix=OPTION_SUFFIX,
        max_new_tokens=16,
        score=choice.lettered,
        origin=origin,
    )


_HUB = "huggingface.co/datasets"
CHOICE_TASKS = (
    _lettered(
        "blink", "BLINK", "blink", "val.parquet", "", f"{_HUB}/BLINK-Benchmark/BLINK, the parts of val in one file"
    ),
    _lettered("muirbench", "MuirBench", "muirbench", "test.parquet", "", f"{_HUB}/MUIRBENCH/MUIRBENCH, in one file"),
    _lettered(
        "videomme", "Video-MME", "videomme", "test.parquet", "data", f"{_HUB}/lmms-lab/Video-MME, without subtitles"
    ),
    _lettered(
        "mvbench",
        "MVBench",
        "mvbench",
        "json",
        "video",
        f"{_HUB}/OpenGVLab/MVBench, its archives of videos unpacked below video",
    ),
    _lettered(
        "choices", "choices", ".", "choices.jsonl", "", "one's own: {question, options, answer, images or video} a line"
    ),
)
