"""Which questions the quickstart asks, and which numbers it takes."""

import pytest


def test_questions_are_taken_at_even_distances():
    from run import spread

    rows = [{"question_id": number} for number in range(10)]
    assert [row["question_id"] for row in spread(rows, 4)] == [0, 2, 5, 7]
    assert spread(rows, 10) == spread(rows, 99) == rows


def test_runs_keep_what_they_measured_of_their_data_in_one_folder(tmp_path):
    from run import share_index

    for name in ("stage2", "stage3", "stage2"):
        share_index(tmp_path, name)
    (tmp_path / "stage2/data_index/lengths.npy").write_text("measured")
    assert (tmp_path / "stage3/data_index/lengths.npy").read_text() == "measured"
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    assert (moved / "stage3/data_index/lengths.npy").read_text() == "measured"


@pytest.mark.parametrize("option", ["--steps-scale=-1", "--steps-scale=0", "--steps-scale=nan", "--questions=0"])
def test_a_number_that_trains_or_asks_nothing_is_refused_at_once(option, monkeypatch, capsys):
    import run

    monkeypatch.setattr("sys.argv", ["run.py", option])
    with pytest.raises(SystemExit) as ended:
        run.parse_arguments()
    said = capsys.readouterr().err
    assert ended.value.code == 2 and option.partition("=")[0] in said and option.partition("=")[2] in said
