"""`checkpoint.place_experts` is refused where no expert could move, or would move wrongly."""

import pytest

from megatron_moellava.validation.expert_places import expert_place_problems
from megatron_moellava.validation.numbers import number_problems
from tests.helpers.runs import tiny

GOOD = {
    "parallel__expert_model_parallel_size": 2,
    "checkpoint__save": "runs/stage3",
    "checkpoint__place_experts": 0.05,
}
BAD = {
    "dense": ({"moe": None}, "the language model is dense"),
    "one rank": ({"parallel__expert_model_parallel_size": 1}, "one rank holds all experts"),
    "not saved": ({"checkpoint__save": None}, "checkpoint.save is not set; set it too"),
    "in the background": ({"checkpoint__async_save": True}, "with checkpoint.async_save=true"),
    "seldom observed": (
        {"logging__routing_interval": 11, "checkpoint__save_interval": 20},
        "every logging.routing_interval=11 steps, and a checkpoint every checkpoint.save_interval=20",
    ),
    "adapters": ({"training__lora": {"rank": 4}}, "with training.lora"),
    "delayed scaling": (
        {"training__precision": "bf16", "training__fp8_recipe": "delayed"},
        "with training.fp8_recipe=delayed",
    ),
}


def spoken(**changes) -> list[str]:
    return list(expert_place_problems(tiny(**(GOOD | changes))))


def test_a_run_that_has_what_it_needs_is_right():
    assert spoken() == [] == list(number_problems(tiny(**GOOD)))
    assert spoken(logging__routing_interval=10, checkpoint__save_interval=20) == []


@pytest.mark.parametrize("name", BAD)
def test_each_lack_is_said_in_a_sentence_and_only_where_experts_shall_move(name):
    changes, expected = BAD[name]
    (said,) = spoken(**changes)
    assert said.startswith("checkpoint.place_experts=0.05") and expected in said
    assert spoken(**changes, checkpoint__place_experts=None) == []


@pytest.mark.parametrize("share", [0.0, -0.1, 1.0, float("nan")])
def test_a_share_lies_between_nothing_and_all(share):
    said = list(number_problems(tiny(**GOOD | {"checkpoint__place_experts": share})))
    assert said == [
        f"checkpoint.place_experts={share} must be a share above 0 and below 1, such as 0.05, or be left unset"
    ]
