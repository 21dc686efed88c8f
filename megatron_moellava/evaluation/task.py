"""What a benchmark is: one record, with the questions that it reads."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_moellava.config import ConfigError, DataError
from megatron_moellava.evaluation.answered import Answered
from megatron_moellava.evaluation.choice_questions import CHOICE_READERS
from megatron_moellava.evaluation.metrics import Score
from megatron_moellava.evaluation.place_questions import PLACE_READERS
from megatron_moellava.evaluation.questions import READERS, Question
from megatron_moellava.evaluation.quickstart.pope import read_quickstart_pope

_READERS = READERS | PLACE_READERS | CHOICE_READERS | {"quickstart_pope": read_quickstart_pope}
OPTION_SUFFIX = "\nAnswer with the option's letter from the given choices directly."


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One benchmark. Paths are relative to the folder of `--data`."""

    name: str
    title: str  # the paper's column where there is one
    folder: str  # inside --data
    questions: str  # the question file, inside the folder
    reader: str  # a name in _READERS
    images: str = ""  # folder with the pictures, inside the folder; "": in the question file, or the folder itself
    suffix: str = ""  # what the original's driver appends to the question
    locates: bool = False  # answers name places: predictions.jsonl keeps them in pixels
    image_aspect_ratio: str = "model"  # "model": as the model was trained (pad); "square": the processor alone
    max_new_tokens: int = 128
    logs_turn: bool = (
        False  # a prediction's `prompt` is the whole user turn (ScienceQA's scorer looks for <image> in it)
    )
    score: Callable[[Answered], Score | None] | None = None  # None: only the server can
    submit: Callable[[Answered], Path] | None = None
    server: str = ""  # where the submission file goes
    judge: str = ""  # the original's judge, where one is needed
    needs: tuple[str, ...] = ()  # other files and folders that scoring reads, inside the folder
    pictures: tuple[str, ...] = ()  # folders below `images` that asking reads
    packages: tuple[str, ...] = ()  # Python packages of the `eval` extra
    origin: str  # where the data come from

    def check_data(self, data: Path, *, asking: bool = True) -> Path:
        """The task's folder. DataError when anything is missing: what, where it comes from, what the folder needs.

        Raises ConfigError for a package that is not installed.
        """
        folder = data / self.folder
        pictures = (self.images, *self.pictures) if asking else ()
        wanted = list(dict.fromkeys(name for name in (self.questions, *pictures, *self.needs) if name))
        missing = [name for name in wanted if not (folder / name).exists()]
        if missing:
            tree = "\n".join(f"  {folder / name}{'   <- missing' if name in missing else ''}" for name in wanted)
            raise DataError(f"{self.title}: {len(missing)} of {len(wanted)} are missing.\n{tree}\nFrom: {self.origin}")
        for package in self.packages:
            if importlib.util.find_spec(package) is None:
                raise ConfigError(f"{self.title} needs the package {package!r}; pip install 'megatron-moellava[eval]'")
        return folder

    def read(self, data: Path, *, circular: bool = False, asking: bool = True) -> list[Question]:
        """All questions in the file's order; `asking` also wants the pictures. DataError: empty, or an id repeats.

        Raises ConfigError for `circular` where there are no options.
        """
        folder = self.check_data(data, asking=asking)
        if circular and f"{self.reader}_circular" not in _READERS:
            raise ConfigError(f"circular=True: {self.title} has no options to rotate; only the MMBench tasks have")
        reader = _READERS[f"{self.reader}_circular" if circular else self.reader]
        questions = reader(folder / self.questions, folder / self.images)
        if not questions:
            raise DataError(f"{folder / self.questions} holds no question; fetch it again from {self.origin}")
        if len({question.key for question in questions}) < len(questions):
            raise DataError(f"{folder / self.questions} repeats a question id; fetch it again from {self.origin}")
        return questions
