"""Files for the benchmarks' servers and official tools, in the layout each expects; each function returns the path."""

import json
from pathlib import Path

from megatron_moellava.config import DataError
from megatron_moellava.evaluation import normalise
from megatron_moellava.evaluation.answered import Answered
from megatron_moellava.evaluation.questions import is_missing, read_jsonl, read_tsv

# MMBench's server wants the table without these and with `prediction` as the seventh column.
_MMBENCH_DROPPED = frozenset({"hint", "category", "source", "image", "comment", "l2-category"})
_MMBENCH_PREDICTION_COLUMN = 6


def _write_json(path: Path, value: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    return path


def vqav2(answered: Answered) -> Path:
    """[{"question_id", "answer"}] over the whole of test2015: the server refuses a shorter list, so the rest is "".

    Raises DataError for questions that are not in it.
    """
    texts = {str(question.id): normalise.evalai(text) for question, text in answered}
    listed = [row["question_id"] for row in read_jsonl(answered.folder / "llava_vqav2_mscoco_test2015.jsonl")]
    if strangers := sorted(set(texts) - set(map(str, listed))):
        raise DataError(f"question {strangers[0]} is not in llava_vqav2_mscoco_test2015.jsonl; the files do not match")
    rows = [{"question_id": id_, "answer": texts.get(str(id_), "")} for id_ in listed]
    return _write_json(answered.work / f"{answered.name}.json", rows)


def vizwiz(answered: Answered) -> Path:
    """[{"image", "answer"}] in the order of the question file."""
    rows = [{"image": question.fields["image"], "answer": normalise.evalai(text)} for question, text in answered]
    return _write_json(answered.work / f"{answered.name}.json", rows)


def gqa(answered: Answered) -> Path:
    """[{"questionId", "prediction"}] for GQA's own eval.py."""
    rows = [{"questionId": question.id, "prediction": normalise.gqa(text)} for question, text in answered]
    return _write_json(answered.work / "testdev_balanced_predictions.json", rows)


def seed(answered: Answered) -> Path:
    """{"question_id", "prediction"} a line for SEED-Bench's leaderboard."""
    path = answered.work / f"{answered.name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"question_id": question.id, "prediction": text} for question, text in answered]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def mm_vet(answered: Answered) -> Path:
    """{"v1_<id>": text}, which MM-Vet's own grader and its online evaluator read."""
    return _write_json(answered.work / f"{answered.name}.json", {f"v1_{q.id}": text for q, text in answered})


def mmbench(answered: Answered, table: str) -> Path:
    """The question table as .xlsx with a `prediction` column; of several rounds only the unrotated one goes in."""
    import openpyxl

    texts = {str(question.id): text for question, text in answered if question.round == 0}
    rows = read_tsv(answered.folder / table)
    columns = [name for name in rows[0] if name not in _MMBENCH_DROPPED]
    columns.insert(_MMBENCH_PREDICTION_COLUMN, "prediction")
    book = openpyxl.Workbook(write_only=True)
    sheet = book.create_sheet("Sheet1")
    sheet.append(columns)
    for row in rows:
        cells = row | {"prediction": texts.get(row["index"]), "index": int(row["index"])}
        sheet.append([None if is_missing_cell(cells[name]) else cells[name] for name in columns])
    path = answered.work / f"{answered.name}.xlsx"
    path.parent.mkdir(parents=True, exist_ok=True)
    book.save(path)
    return path


def is_missing_cell(value: str | int | None) -> bool:
    """Whether a cell of a TSV file stands for no value."""
    return value is None or (isinstance(value, str) and is_missing(value))
