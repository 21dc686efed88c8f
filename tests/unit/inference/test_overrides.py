"""What the command line may change for chat, serve, evaluate and analyze: used, or refused."""

import dataclasses

import pytest

from megatron_moellava.config import ConfigError, ExpertGroups, MoEConfig, ParallelConfig, RunConfig
from megatron_moellava.inference.overrides import HONOURED, OF_ROWS, layout_with, parse_overrides, run_with
from tests.helpers.inference_models import tiny_run

ORIGINAL = MoEConfig(router="original", moe_expert_capacity_factor=1.5)
SECTIONS = {"parallel", "model", "moe", "training", "data", "optimizer", "checkpoint", "logging"}


def fields_of(section: str) -> list[dataclasses.Field]:
    classes = {item.name: item.default_factory for item in dataclasses.fields(RunConfig)}
    example = {"model": tiny_run().model, "training": tiny_run().training, "moe": MoEConfig()}
    return list(dataclasses.fields(example.get(section) or classes[section]()))


@pytest.mark.parametrize("section", sorted(SECTIONS))
def test_every_field_of_a_run_is_in_the_table_or_refused(section):
    known = HONOURED.get(section, ())
    names = {item.name for item in fields_of(section)}
    assert set(known) <= names
    for name in sorted(names - set(known)):
        value = {"sources": "[]", "backbone": "phi-2"}.get(name)
        if value is None:  # a value of the right type: its own default
            default = next(item for item in fields_of(section) if item.name == name).default
            value = "null" if default is None else 2 if default is dataclasses.MISSING else str(default).lower()
            value = "[]" if default == () else default if isinstance(default, str) else value
        with pytest.raises(ConfigError, match=f"{section}.{name} changes nothing here"):
            parse_overrides([f"{section}.{name}={value}"])


def test_an_analysis_also_says_how_rows_are_made():
    assert parse_overrides(["data.label_mode=spans"], rows=True) == {"data": {"label_mode": "spans"}}
    with pytest.raises(ConfigError, match=r"data\.label_mode changes nothing here"):
        parse_overrides(["data.label_mode=spans"])
    assert not set(OF_ROWS) & set(HONOURED["data"])


def test_what_is_said_wins():
    given = parse_overrides(
        [
            "moe.second_choice=deterministic",
            "moe.eval_capacity_factor=4",
            "model.scale_multimodal_embeddings=false",
            "parallel.tensor_model_parallel_size=2",
            "data.image_grid=true",
            "training.seed=7",
        ]
    )
    run = run_with(tiny_run(ORIGINAL), given)
    assert (run.moe.second_choice, run.moe.eval_capacity_factor) == ("deterministic", 4)
    assert not run.model.scale_multimodal_embeddings and run.data.image_grid and run.training.seed == 7
    assert layout_with(ParallelConfig(), given).tensor_model_parallel_size == 2


@pytest.mark.parametrize(
    ("override", "moe", "reason"),
    [
        ("moe.second_choice=deterministic", None, "dense"),
        ("moe.second_choice=deterministic", MoEConfig(), "moe.router=megatron, which is deterministic"),
        ("moe.moe_router_topk=3", ORIGINAL, "between 1 and 2"),
        ("moe.moe_router_topk=3", MoEConfig(expert_groups=ExpertGroups(image=2, text=2)), "between 1 and 2"),
    ],
)
def test_what_the_checkpoint_has_no_use_for_is_refused(override, moe, reason):
    with pytest.raises(ConfigError, match=reason):
        run_with(tiny_run(moe), parse_overrides([override]))


@pytest.mark.parametrize(
    ("override", "advice"),
    [("data.template=v1", "--template"), ("training.precision=fp32", "--precision"), ("moe.secnd=1", "unknown|secnd")],
)
def test_a_refusal_says_what_to_do(override, advice):
    with pytest.raises(ConfigError, match=advice):
        parse_overrides([override])
