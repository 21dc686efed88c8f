"""What a scorer gets: the questions in order, the text given to each, and where to find the truth and a judge."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_moellava.evaluation.judge import Judge
from megatron_moellava.evaluation.questions import Question


@dataclass(frozen=True, kw_only=True, slots=True)
class Answered:
    """Questions and answers of one benchmark, ready to be scored."""

    folder: Path  # the benchmark's data
    work: Path  # the run's own folder: reviews and submission files go there
    name: str  # of the model, as it appears in submission files
    questions: Sequence[Question]
    texts: Sequence[str]  # one per question, stripped
    metadata: Sequence[dict] = ()  # one per question, where the predictions have any: {"regions": ...}
    judge: Judge | None = None

    def __iter__(self) -> Iterator[tuple[Question, str]]:
        return zip(self.questions, self.texts, strict=True)

    def __len__(self) -> int:
        return len(self.questions)

    def note_subset(self, published: int) -> list[str]:
        """A note for the table when fewer questions were asked than the benchmark has."""
        return [f"subset: {len(self)} of {published} questions"] if len(self) < published else []
