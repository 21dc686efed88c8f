"""The options of `moellava make-preferences`; what it makes is in tests/unit/evaluation/test_make_preferences.py."""

import pytest

from megatron_moellava.commands.make_preferences import main, parse_args

NEEDED = ["--load", "run", "--data", "rows.json", "--save", "pairs.jsonl"]


def test_settings_of_the_layout_may_stand_anywhere():
    args = parse_args([*NEEDED, "parallel.tensor_model_parallel_size=2", "--samples", "4"])
    assert args.overrides == ["parallel.tensor_model_parallel_size=2"] and args.samples == 4
    assert (args.scorer, args.with_truth, args.image_folder) == ("exact", False, None)


@pytest.mark.parametrize(
    ("option", "value"),
    [("--samples", "0"), ("--temperature", "0"), ("--top-p", "1.5"), ("--limit", "-1"), ("--scorer", "guess")],
)
def test_what_means_nothing_is_a_usage_error(option, value, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*NEEDED, option, value])
    assert stop.value.code == 2 and f"argument {option}" in capsys.readouterr().err


def test_a_scorer_without_its_judge_is_said_before_the_rows_are_read(capsys):
    assert main([*NEEDED, "--scorer", "judge"]) == 2
    assert "--judge-url and --judge-model" in capsys.readouterr().err
