"""Scores to disk and into a table with the paper's rows beside ours.

Ours stands with its standard error; a judge, a subset or a local stand-in for a server's score becomes a footnote,
since a number without its label would look comparable where it is not.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_moellava.evaluation.answered import Answered
from megatron_moellava.evaluation.metrics import BOOTSTRAP_SAMPLES, Score
from megatron_moellava.evaluation.published import COLUMNS, PUBLISHED, Published
from megatron_moellava.evaluation.questions import read_json
from megatron_moellava.evaluation.scorers.yes_no import POPE_CATEGORIES
from megatron_moellava.evaluation.task import Task
from megatron_moellava.evaluation.tasks import TASKS

_POPE = ("pope", "quickstart_pope", "names_pope")  # with a table of their categories


def score_and_submit(task: Task, answered: Answered, *, bootstrap_samples: int = BOOTSTRAP_SAMPLES) -> dict:
    """Scores what can be scored here, writes the submission file where there is a server; returns the record."""
    score = task.score(answered) if task.score else None
    record = {"benchmark": task.name, "title": task.title, "model": answered.name, "asked": len(answered)}
    record |= _scored(score, bootstrap_samples) if score else {"value": None, "notes": [_why_unscored(task, answered)]}
    if task.submit:
        record |= {"submission": str(task.submit(answered)), "server": task.server}
    return record


def _scored(score: Score, bootstrap_samples: int) -> dict:
    return {
        "metric": score.metric,
        "value": score.value,
        "standard_error": score.standard_error(bootstrap_samples),
        "bootstrap": {"samples": bootstrap_samples, "unit": score.unit, "units": len(score.sums_UK)},
        "count": score.count,
        "details": score.details,
        "notes": list(score.notes),
    }


def _why_unscored(task: Task, answered: Answered) -> str:
    if task.judge and answered.judge is None:
        return f"not judged: give --judge-url and --judge-model (the original used {task.judge})"
    return f"answers are not public; upload the submission file to {task.server}"


def write_record(folder: Path, record: Mapping) -> Path:
    """Write `record` as scores.json into `folder` (made if missing), and return the file."""
    path = folder / "scores.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False), encoding="utf-8")
    return path


def read_records(out: Path) -> list[dict]:
    """The records of every benchmark under `out`, in the order of the tasks."""
    return [read_json(out / name / "scores.json") for name in TASKS if (out / name / "scores.json").exists()]


def write_summary(out: Path) -> str:
    """scores.json and table.md over all benchmarks of the folder; returns the table."""
    records = read_records(out)
    (out / "scores.json").write_text(json.dumps(records, indent=1, ensure_ascii=False), encoding="utf-8")
    table = format_table(records)
    (out / "table.md").write_text(table, encoding="utf-8")
    return table


def format_table(records: Sequence[Mapping]) -> str:
    """Markdown: one row per published model and one per model of ours, footnotes below, POPE's categories apart."""
    titles = [record["title"] for record in records]
    rows = [["Model", "act.", "res.", *titles]]
    if any(title in COLUMNS for title in titles):
        rows += [_published_row(row, titles) for row in PUBLISHED]
    notes: list[str] = []
    models = dict.fromkeys(record["model"] for record in records)
    rows += [[f"**{model}** (ours)", "", "", *_our_cells(records, model, notes)] for model in models]
    footnotes = "".join(f"\n[{number}] {note}" for number, note in enumerate(notes, start=1))
    pope = "".join(_pope_table(record) for record in records if record["benchmark"] in _POPE and record.get("details"))
    error = "\nOurs ± bootstrap standard error; the paper gives none.\n"
    return _markdown(rows) + error + (footnotes + "\n" if footnotes else "") + pope


def _published_row(row: Published, titles: Sequence[str]) -> list[str]:
    values = [row.score(title) for title in titles]
    return [row.model, row.activated, str(row.resolution), *("" if v is None else f"{v:.1f}" for v in values)]


def _our_cells(records: Sequence[Mapping], model: str, notes: list[str]) -> list[str]:
    cells = []
    for record in records:
        if record["model"] != model:
            cells.append("")
            continue
        marks = ""
        for note in record["notes"]:
            if note not in notes:
                notes.append(note)
            marks += f" [{notes.index(note) + 1}]"
        value = "-" if record["value"] is None else f"{record['value']:.1f} ± {record['standard_error']:.1f}"
        cells.append(value + marks)
    return cells


def _pope_table(record: Mapping) -> str:
    """Accuracy / F1 / share of yes per category, beside the paper's."""

    def cell(numbers: Sequence[float]) -> str:
        return " / ".join(f"{number:.1f}" for number in numbers)

    rows = [[f"{record['title']}: accuracy / F1 / yes", *POPE_CATEGORIES]]
    if record["title"] in COLUMNS:
        rows += [[row.model, *map(cell, row.pope)] for row in PUBLISHED if row.pope]
    ours = [record["details"].get(category) for category in POPE_CATEGORIES]
    rows.append(
        [
            f"**{record['model']}** (ours)",
            *("" if c is None else cell((c["accuracy"], c["f1"], c["yes_ratio"])) for c in ours),
        ]
    )
    return "\n" + _markdown(rows)


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines) + "\n"
