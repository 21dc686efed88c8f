"""docs/reference/configuration.md says what the program does, since it is made of the program."""

import dataclasses
import typing

from megatron_moellava import config
from megatron_moellava.config_reference import comments, page
from megatron_moellava.model import configuration, router_kinds
from megatron_moellava.placement import moe_layers
from megatron_moellava.routers import ROUTERS
from megatron_moellava.stages import ROLES, STAGES
from megatron_moellava.validation.numbers import RULES
from tests.helpers.paths import REPO


def test_the_page_in_the_repository_is_what_the_sources_say():
    assert (REPO / "docs/reference/configuration.md").read_text() == page(), "run `make docs`"


def test_comments_beside_and_above_a_field_are_its_meaning():
    source = """
class Section:
    # not of a field

    first: int = 1  # beside
    # above
    # in two lines
    second: str = "# no comment"
    third: int = (
        3  # inside
    )
    fourth: int = 4
"""
    found = comments(source)
    assert {field: text for (_, field), text in found.items()} == {
        "first": "beside",
        "second": "above in two lines",
        "third": "inside",
        "fourth": "",
    }


def test_every_section_and_field_is_on_the_page():
    text = page()
    for section, hint in typing.get_type_hints(config.RunConfig).items():
        cls = next(option for option in typing.get_args(hint) or (hint,) if dataclasses.is_dataclass(option))
        assert f"## {section}\n\n{cls.__doc__}" in text
        assert all(f"| `{item.name}` |" in text for item in dataclasses.fields(cls))


def test_number_rules_are_of_fields_that_exist():
    sections = {
        name: typing.get_args(hint) or (hint,) for name, hint in typing.get_type_hints(config.RunConfig).items()
    }
    sections |= {"training.lora": (config.LoraConfig,), "training.distillation": (config.DistillationConfig,)}
    sections["moe.expert_groups"] = (config.ExpertGroups,)
    parts = typing.get_type_hints(config.RolesConfig)
    sections |= {f"optimizer.roles.{part}": typing.get_args(hint) for part, hint in parts.items()}
    for path in RULES:
        section, _, name = path.rpartition(".")
        assert any(name in getattr(cls, "__dataclass_fields__", {}) for cls in sections[section]), path


def test_what_a_value_means_is_known_for_every_legal_value():
    """Tables by a field's value have each of its legal values, and no other."""

    def legal(cls: type, name: str) -> set:
        hint = typing.get_type_hints(cls)[name]
        options = [hint, *typing.get_args(hint)]
        return set(typing.get_args(next(option for option in options if typing.get_origin(option) is typing.Literal)))

    assert legal(config.TrainingConfig, "stage") == {*STAGES}
    assert legal(config.TrainingConfig, "precision") == {"auto", *configuration.DTYPES}
    assert legal(config.TrainingConfig, "recompute") == {*configuration.RECOMPUTE}
    assert legal(config.TrainingConfig, "fp8_recipe") == {*configuration.FP8_RECIPES}
    assert legal(config.MoEConfig, "router") == {*ROUTERS} == {*router_kinds.MODULES}
    assert all(moe_layers(name, 4) for name in legal(config.MoEConfig, "placement"))
    assert {role for roles in STAGES.values() for role in roles} <= {*ROLES} == {*typing.get_args(config.Role)}
