"""A checkpoint answers a benchmark, from the command line's words to the table."""

import json

from megatron_moellava.commands.evaluate import parse_args
from megatron_moellava.evaluation.ask import ask_checkpoint
from tests.helpers import evaluation_miniatures as miniatures
from tests.helpers.inference_models import tiny_checkpoint


def test_answers_scores_and_table_are_written(tmp_path):
    miniatures.gqa(tmp_path / "eval")
    folder = tiny_checkpoint(tmp_path / "tiny model")
    words = [
        "--load",
        str(folder),
        "--benchmark",
        "gqa",
        "--data",
        str(tmp_path / "eval"),
        "--out",
        str(tmp_path / "out"),
    ]
    table = ask_checkpoint(parse_args([*words, "--bootstrap", "10", "--batch-size", "2"]))
    assert "tiny model" in table and "GQA" in table
    answers = [json.loads(line) for line in (tmp_path / "out/gqa/predictions.jsonl").read_text().splitlines()]
    assert len(answers) == 3 and all(row["text"] is not None for row in answers)
    assert ask_checkpoint(parse_args([*words, "--bootstrap", "10"])) == table, "nothing is left to ask"
