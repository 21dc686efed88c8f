"""The table beside the paper's rows."""

from megatron_moellava.evaluation.report import format_table


def test_table_shows_the_paper_beside_ours_with_error_and_footnotes():
    pope = {"accuracy": 80.0, "f1": 81.0, "yes_ratio": 50.0}
    records = [
        {
            "benchmark": "pope",
            "title": "POPE",
            "model": "m",
            "value": 81.04,
            "standard_error": 0.96,
            "notes": ["subset: 6 of 9 questions"],
            "details": {"popular": pope},
        },
        {"benchmark": "mm_vet", "title": "MM-Vet", "model": "m", "value": None, "notes": ["not judged"]},
    ]
    lines = format_table(records).splitlines()
    assert [cell.strip() for cell in lines[0].strip("|").split("|")] == ["Model", "act.", "res.", "POPE", "MM-Vet"]
    assert "| LLaVA-Phi" in lines[4]
    assert lines[4].rstrip(" |").endswith("28.9")
    assert "| 81.0 ± 1.0 [1] | - [2]" in lines[10]
    assert "[1] subset: 6 of 9 questions" in lines
    assert "[2] not judged" in lines
    assert any("**m** (ours)" in line and "80.0 / 81.0 / 50.0" in line for line in lines[12:])
    assert any("85.9 / 84.9 / 43.2" in line for line in lines[12:])
