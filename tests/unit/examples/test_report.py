"""The quickstart's report of either preset, from what its runs leave behind."""

import json
import math
from argparse import Namespace

import pytest


def answered(bits=3.0):
    return [
        {"question_id": n, "image": "a.png", "question": q, "answer": a, "type": kind, "prediction": a, "loss": bits}
        for n, (q, a, kind) in enumerate([("is there a circle?", "yes", "existence"), ("what color?", "red", "color")])
    ]


def names(bits, prediction):
    row = {
        "question_id": "1F431-en",
        "image": "names/test/1F431-2.png",
        "question": "what is this called? (en)",
        "answer": "cat face",
        "type": "name en",
        "prediction": prediction,
        "loss": bits * math.log(2),
    }
    from megatron_moellava.evaluation.quickstart.names import score_names

    return {"score": score_names([row, row | {"question_id": 2}]), "answered": [row, row | {"question_id": 2}]}


def write_run(out, plan):
    """Data, ceiling and step logs as the runs of `plan` leave them."""
    answers = ["cat face", *"bcdefgh"]
    turns = [{"from": "human", "value": "<image>\nwhat is this called?"}, {"from": "gpt", "value": "; ".join(answers)}]
    rows = [{"id": "b", "image": "b.png", "tag": "color", "conversations": turns}]
    (out / "data").mkdir()
    test = {"question_id": "c", "image": "c.png", "question": "what is this called?", "answers": answers}
    (out / "data/names_test.jsonl").write_text(json.dumps(test) + "\n")
    for file in ("conversations.json", "names.json"):
        (out / "data" / file).write_text(json.dumps(rows))
    (out / "ceiling").mkdir()
    (out / "ceiling/ceiling.json").write_text(json.dumps({"exact": 80.0, "pictures": 2, "among": 2}))
    for name in plan:
        (out / name).mkdir()
        steps = [{"iteration": n, "loss": 3.0 / n, "tokens_per_second": 10.0, "step_seconds": 1.0} for n in (1, 2, 3)]
        (out / name / "steps.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))


@pytest.mark.parametrize("preset", ["names", "fast"])
def test_table_summary_and_pictures_of_either_preset(preset, tmp_path, capsys):
    import plans
    from report import write_report

    from megatron_moellava.evaluation.quickstart.metrics import score_quickstart

    plan = plans.PLANS[preset]
    write_run(tmp_path, plan)
    cost = {"flops_per_token": 2.5e6, "activated": 1_000_000, "total": 1_000_000}
    easy = {"score": score_quickstart(answered()), "answered": answered()}
    results = {name: {"cost": cost} | (easy if name in plans.PERCEPTION else {}) for name in plan}
    results["stage3"] |= {
        "blanked": answered(),
        "blanked_every": 1,
        "expert_load": [[[3, 1]] * 2] * 4,
        "moe_layers": [0, 2],
    }
    if preset == "names":
        results["names"]["names"] = names(9.0, "dog")
        results["names_dense"]["names"] = names(7.0, "dog")
        results["names_moe"]["names"] = names(4.0, "cat face")
    arguments = Namespace(preset=preset, backbone="llama-tiny", seed=1, overrides=[])
    write_report(tmp_path, arguments, plan, plans.TITLES, results, {"data": 1.0})
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert list(summary["results"]) == list(plans.PERCEPTION)
    assert ("names" in summary) == (preset == "names")
    said = capsys.readouterr().out
    if preset == "names":
        assert summary["names"]["moe_minus_dense"]["bits_saved"] == pytest.approx(3.0)
        assert summary["names"]["moe_minus_dense"]["exact"] == 100.0
        assert "make chat ARGS='--load" in said
    for picture in ("curves.png", "expert_load.png", *["names.png"] * (preset == "names")):
        assert (tmp_path / picture).stat().st_size > 1000 and str(tmp_path / picture) in said
