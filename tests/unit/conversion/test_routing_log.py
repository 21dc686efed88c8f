"""A run's record of its routers, as it lies on a disk after kills and steps back."""

import json

from megatron_moellava.conversion.routing_log import PLACED_AT, asked_for, fits, records_of, steps_of


def record(iteration, *choices, dropped=(0, 0)):
    layers = [{"layer": number, "choices": list(row), "dropped": list(dropped)} for number, row in enumerate(choices)]
    return {"iteration": iteration, "layers": layers}


def test_nothing_behind_the_checkpoint_counts(tmp_path):
    told = [record(10, (1, 1)), record(20, (2, 2)), record(30, (9, 9))]
    file = tmp_path / "routing.jsonl"
    file.write_text("\n".join(map(json.dumps, told)) + '\n{"iteration": 25, "la')
    assert records_of(file, steps_of({}, 25)) == told[:2]
    assert records_of(file, steps_of({}, 9)) == [] == records_of(tmp_path / "none.jsonl", steps_of({}, 25))


def test_nothing_from_before_experts_changed_places_counts(tmp_path):
    told = [record(10, (1, 1)), record(20, (2, 2)), record(30, (9, 9))]
    file = tmp_path / "routing.jsonl"
    file.write_text("\n".join(map(json.dumps, told)))
    assert records_of(file, steps_of({PLACED_AT: 10}, 30)) == told[1:]
    assert records_of(file, steps_of({PLACED_AT: 30}, 30)) == []


def test_a_line_that_a_kill_cut_off_may_have_others_behind_it(tmp_path):
    file = tmp_path / "routing.jsonl"
    file.write_text('{"iteration": 1, "la\n' + json.dumps(record(2, (1, 0))) + "\n")
    assert records_of(file, steps_of({}, 5)) == [record(2, (1, 0))]


def test_what_fits_has_the_models_layers_and_experts():
    assert fits(record(1, (1, 2), (3, 4)), (0, 1), 2)
    assert not fits(record(1, (1, 2)), (0, 1), 2) and not fits(record(1, (1, 2), (3, 4)), (0, 1), 3)


def test_dropped_choices_were_asked_for():
    assert asked_for([record(1, (1, 2), (3, 4), dropped=(5, 0)), record(2, (1, 0), (0, 1))]) == {0: [7, 2], 1: [8, 5]}
    assert asked_for([]) == {}
