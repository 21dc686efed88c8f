"""The page "preferences" is made of the data beside it, and of nothing else."""

import json
import statistics

PROGRAM, GRID = "preferences_page", "preferences"


def test_the_page_is_what_the_data_give(program, grid, rows, written):
    assert rows and written == program.page(grid, rows)
    assert all(row["cell"] in grid.cells and 0 <= row[program.F1] <= 100 for row in rows)


def test_what_is_finished_is_taken_with_its_number_of_pairs(program, grid, tmp_path):
    for cell in ("stage III", "DPO with the SFT term"):
        chain = grid.chain(cell, 2)
        (tmp_path / chain[-1].name).mkdir()
        numbers = {program.F1: 60.0, program.ORDINARY: 99.0, "steps": 40, "train_minutes": 3.0}
        (tmp_path / chain[-1].name / "done.json").write_text(json.dumps({"numbers": numbers}))
    pairs = tmp_path / next(node for node in chain if node.step == "pairs").name
    pairs.mkdir()
    made = [{"chosen": "no", "rejected": "yes"}, {"chosen": "no", "rejected": "circle"}]
    (pairs / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in made))
    plain, preferred = program.gather(tmp_path, grid)
    assert plain == {
        "grid": "preferences",
        "cell": "stage III",
        "seed": 2,
        program.F1: 60.0,
        program.ORDINARY: 99.0,
        "steps": 40,
    }
    assert (preferred["pairs"], preferred["contrasts"]) == (2, 1) and "pairs" not in plain


def test_a_finding_is_the_paired_difference_of_its_two_cells(program, grid):
    rows = [
        {"cell": cell, "seed": seed, program.F1: f1 + seed, program.ORDINARY: 99.0 - gone}
        for cell, f1, gone in (("stage III", 60, 0), ("chosen answers alone", 70, 2), ("DPO with the SFT term", 74, 1))
        for seed in (1, 2, 3)
    ]
    first, second = program.findings(grid, rows).splitlines()
    assert "F1 +14.00 ± 0.00, easy-VQA -1.00 ± 0.00" in first
    assert "F1 +4.00 ± 0.00, easy-VQA +1.00 ± 0.00" in second and "3 seeds" in second


def test_what_the_page_says_is_true_of_the_data(program, rows):

    def seeds(cell, metric):
        return {row["seed"]: row[metric] for row in rows if row["cell"] == cell}

    def gained(cell, metric):
        before, after = seeds("stage III", metric), seeds(cell, metric)
        return [after[seed] - before[seed] for seed in (1, 2, 3)]

    preferred, alone = "DPO with the SFT term", "chosen answers alone"
    there, missing = program.POLLED.values()
    assert min(gained(preferred, program.F1)) > 0 and 2 < statistics.fmean(gained(preferred, program.F1)) < 5
    assert max(gained(preferred, program.ORDINARY)) < 0
    assert min(seeds("stage III", missing).values()) > 95 and max(seeds("stage III", there).values()) < 50
    assert min(gained(preferred, there)) > 0 and statistics.fmean(gained(preferred, missing)) < 0
    pairs_more = statistics.fmean(gained(preferred, program.F1)) - statistics.fmean(gained(alone, program.F1))
    assert abs(pairs_more) < 3
    longer = "the same for 75 steps"
    assert min(gained(longer, program.F1)) > 5
    assert max(gained(longer, program.ORDINARY)) < min(gained(preferred, program.ORDINARY))
    anchored = "with anchors, 100 steps"
    assert min(gained(anchored, program.F1)) > 0 and statistics.fmean(gained(anchored, program.F1)) < 5
    assert max(gained(anchored, program.ORDINARY)) < 0
    for metric, near in ((program.F1, 1), (program.ORDINARY, 0.5)):
        assert abs(statistics.fmean(gained(anchored, metric)) - statistics.fmean(gained(preferred, metric))) < near
    more = "more pairs, 400 gentler steps"
    lightly, alone_more = "400 gentler steps, a fifth of the weight on pairs", "their chosen answers alone, 400 steps"
    six = "six anchors to each pair, 600 gentler steps"
    few = [row["contrasts"] / row["pairs"] for row in rows if "pairs" in row and row["contrasts"] < 200]
    assert len(few) > 12 and all(0.2 <= share < 0.3 for share in few)
    lost = {more: [0, 4, 6], six: [0, 2, 6], lightly: [0, 1, 2], alone_more: [0, 0, 2]}
    for cell, questions in lost.items():
        assert min(gained(cell, program.F1)) > 9.5
        assert sorted(round(-4 * share) for share in gained(cell, program.ORDINARY)) == questions
        assert 60 < statistics.fmean(seeds(cell, there).values()) < 67
        assert 78 < statistics.fmean(seeds(cell, missing).values()) < 86
    assert abs(statistics.fmean(gained(lightly, program.F1)) - statistics.fmean(gained(more, program.F1))) < 1
    for cell in (more, lightly):
        both = zip(gained(alone_more, program.F1), gained(cell, program.F1), strict=True)
        assert all(alone > with_pairs for alone, with_pairs in both)
    assert statistics.fmean(gained("DPO", program.F1)) < statistics.stdev(gained("DPO", program.F1))
