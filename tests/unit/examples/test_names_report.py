"""The quickstart's account of the names benchmark: what is compared, at which cost, and which picture to try."""

import json
import math

import pytest


def answer(number, prediction, bits, language="en"):
    return {
        "question_id": number,
        "image": f"names/test/{number}-2.png",
        "question": f"what is this called? ({language})",
        "answer": "cat face",
        "type": f"name {language}",
        "prediction": prediction,
        "loss": bits * math.log(2),
    }


@pytest.mark.parametrize("preset", ["fast", "names", "full"])
def test_the_runs_of_a_preset_start_from_what_is_there(preset):
    from plans import PLANS, STARTS, TITLES, UPCYCLED

    made = set()
    for name, run in PLANS[preset].items():
        assert run["from"] in made | set(STARTS) or UPCYCLED[run["from"]] in made
        assert name in TITLES
        made.add(name)


@pytest.mark.parametrize(("moe", "dense", "roles"), [("stage3", "dense", {}), ("names_moe", "names_dense", {2})])
def test_moe_and_dense_learn_the_same_for_as_long_from_the_same_model(moe, dense, roles):
    from plans import PLANS, UPCYCLED

    from megatron_moellava.stages import STAGES

    one, other = PLANS["names"][moe], PLANS["names"][dense]
    for setting in ("steps", "lr", "data", "backbone", "seq_length"):
        assert one.get(setting) == other.get(setting)
    assert UPCYCLED[one["from"]] == other["from"]
    for stage in roles:
        assert set(one["trains"]) == set(STAGES[stage])


def test_a_token_of_the_moe_that_learns_names_meets_one_whole_expert():
    from plans import EXPERTS

    assert EXPERTS["moe_router_topk"] == 1 and "moe_ffn_hidden_size" not in EXPERTS


def test_the_summary_compares_moe_and_dense_on_the_same_questions(tmp_path):
    from names_report import summarise_names

    for folder in ("data", "ceiling"):
        (tmp_path / folder).mkdir()
    names = ["cat face", "katzengesicht", "c", "d", "e", "f", "g", "h"]
    turns = [{"from": "human", "value": "<image>\nwhat is this called?"}, {"from": "gpt", "value": "; ".join(names)}]
    rows = [{"id": "1-0", "image": "names/train/1-0.png", "tag": "names", "conversations": turns}]
    (tmp_path / "data/names.json").write_text(json.dumps(rows))
    test = {"question_id": "1", "image": "names/test/1-2.png", "question": "what is this called?", "answers": names}
    (tmp_path / "data/names_test.jsonl").write_text(json.dumps(test) + "\n")
    (tmp_path / "ceiling/ceiling.json").write_text(json.dumps({"exact": 90.0, "pictures": 2, "among": 2}))

    def result(*answered):
        return {
            "names": {
                "score": {"exact": 50.0 * sum(a["prediction"] == "cat face" for a in answered)},
                "answered": [*answered],
            }
        }

    results = {
        "stage2": {},
        "names_dense": result(answer(1, "cat", 4.0), answer(2, "dog", 6.0)),
        "names_moe": result(answer(1, "cat face", 1.0), answer(2, "dog", 5.0)),
    }
    summary = summarise_names(tmp_path, results)
    assert set(summary["results"]) == {"names_dense", "names_moe"}
    assert summary["moe_minus_dense"] == {
        "exact": 50.0,
        "bits_saved": pytest.approx(2.0),
        "standard_error": pytest.approx(1.0),
    }
    assert summary["question_only_baseline"]["exact"] == 100.0
    assert summary["example"] == {
        "image": "names/test/1-2.png",
        "question": "what is this called?",
        "answer": ["cat face"],
        "prediction": ["cat face"],
    }


def test_the_example_is_the_picture_of_which_most_is_known_the_surest_first():
    from names_report import example_of

    rows = [
        answer(0, "dog", 0.1),
        answer(0, "cat face", 0.1, "de"),
        answer(1, "cat face", 2.0),
        answer(1, "cat face", 0.2, "de"),
        answer(2, "cat face", 1.0),
        answer(2, "cat face", 1.0, "de"),
    ]
    assert example_of(rows)["image"] == "names/test/2-2.png"
    assert example_of(rows[:2])["prediction"] == ["dog", "cat face"]


def test_an_early_mistake_counts_more_than_many_late_ones():
    """Chat goes on from the names that it has given itself."""
    from names_report import example_of

    early = [answer(0, name, 0.1, str(place)) for place, name in enumerate(("dog", *["cat face"] * 5))]
    late = [answer(1, name, 2.0, str(place)) for place, name in enumerate((*["cat face"] * 2, *["dog"] * 4))]
    assert example_of([*early, *late])["image"] == late[0]["image"]


def test_the_table_has_names_costs_and_the_picture_to_try(tmp_path, capsys):
    from names_report import print_names_table
    from plans import TITLES

    def names(exact, bits):
        return {"exact": exact, "bits_per_fact": bits}

    cost = {"flops_per_token": 0.31e6, "activated": 210_000, "total": 210_000}
    summary = {
        "costs": dict.fromkeys(("stage2", "names", "names_dense"), cost) | {"names_moe": cost | {"total": 560_000}},
        "names": {
            "question_only_baseline": names(0.6, None),
            "tower_ceiling": {"exact": 93.2},
            "results": {"names": names(10.0, 20.0), "names_moe": names(21.0, 14.25), "names_dense": names(12.0, 18.5)},
            "moe_minus_dense": {"exact": 9.0, "bits_saved": 4.25, "standard_error": 0.3},
            "example": {"image": "names/test/1F431-2.png", "question": "what is this called?"},
        },
    }
    print_names_table(summary, TITLES, tmp_path)
    lines = capsys.readouterr().out.splitlines()
    rows = {title: line for title in TITLES.values() for line in lines if line.startswith(title)}
    assert rows[TITLES["names_moe"]].split()[-6:] == ["21.0", "14.25", "0.31", "0.21", "/", "0.56"]
    assert rows[TITLES["names_dense"]].split()[-6:] == ["12.0", "18.50", "0.31", "0.21", "/", "0.21"]
    assert rows[TITLES["names"]].split()[-6:] == ["10.0", "20.00", "0.31", "0.21", "/", "0.21"]
    assert any(line.startswith("the tower's own retrieval") and "93.2" in line for line in lines)
    assert any("4.25 ± 0.30 bits per fact saved" in line for line in lines)
    picture = f"{tmp_path}/data/images/names/test/1F431-2.png"
    assert any(f"--load {tmp_path}/names_moe --image {picture}" in line for line in lines)
