"""What is said of a run of stage 4 before a weight is touched."""

from dataclasses import replace

import pytest

from megatron_moellava.backbones import get_backbone
from megatron_moellava.checkpoint.description import RunDescription, write_description
from megatron_moellava.config import ConfigError, MoEConfig
from megatron_moellava.towers import get_tower
from megatron_moellava.validation.preferences import preference_problems
from megatron_moellava.validation.run import load_run, validate
from tests.helpers import data_files
from tests.helpers.made_tokenizer import write_tokenizer
from tests.helpers.runs import tiny
from tests.unit.validation.test_problems import CPU, checkpoint


def spoken(run) -> str:
    return "\n".join(preference_problems(run, get_backbone("llama-tiny"), get_tower("clip-tiny")))


@pytest.fixture
def load(tmp_path) -> str:
    return checkpoint(tmp_path / "load", moe=MoEConfig())


def test_a_run_with_a_reference_is_right(load):
    assert spoken(tiny(training__stage=4, checkpoint__load=load)) == ""
    assert spoken(tiny(training__stage=4, checkpoint__load=load, preference__reference=load)) == ""


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data__packing": False}, "data.packing=false: stage 4 packs"),
        ({"data__label_mode": "original"}, "data.label_mode=original may mask an answer"),
        ({"data__template": "plain"}, "data.template=plain drops the prompt"),
        ({"preference__loss_coeff": 0.0}, "all 0, so nothing would be trained"),
        ({"preference__reference": "nowhere"}, "nowhere"),
        ({"checkpoint__load": None}, "compares with a reference, and there is none: give the model"),
    ],
)
def test_what_stage_4_cannot_do_without(load, fields, message):
    assert message in spoken(tiny(**{"training__stage": 4, "checkpoint__load": load} | fields))


def test_a_reference_is_the_same_model(tmp_path, load):
    other = checkpoint(tmp_path / "other", "phi-2-tiny")
    said = spoken(tiny(training__stage=4, checkpoint__load=load, preference__reference=other))
    assert f"preference.reference={other}" in said and "phi-2-tiny" in said


def test_preferences_belong_to_stage_4():
    assert "preference.* is about training.stage=4, and this is stage 3" in spoken(tiny(preference__beta=0.2))
    assert spoken(tiny()) == ""


def test_a_reference_without_a_seal_cannot_be_named(tmp_path):
    iteration = tmp_path / "old" / "iter_0000001"
    iteration.mkdir(parents=True)
    write_description(iteration, RunDescription(iteration=1, model={}))
    content = (iteration / "run.json").read_text().splitlines()
    (iteration / "run.json").write_text(
        "\n".join(line for line in content if "checksum" not in line).replace(",\n}", "\n}")
    )
    assert "has no seal" in spoken(tiny(training__stage=4, checkpoint__load=str(tmp_path / "old")))


def test_a_run_that_goes_on_needs_its_reference_no_more(tmp_path):
    checkpoint(tmp_path / "save", stage=4, preference={"reference": "seal", "shift": 0.0})
    assert spoken(tiny(training__stage=4, checkpoint__save=str(tmp_path / "save"))) == ""


SAME = {"chosen": "yes", "rejected": "yes"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (SAME, "pairs.json row 1: chosen and rejected are the same answer"),
        ({"rejected": None}, "pairs.json row 1: a row of preferences has `prompt`, `chosen` and `rejected`"),
        ({"image": "c.png", "images": None}, "c.png does not exist"),
    ],
)
def test_a_bad_pair_is_found_before_the_run(tmp_path, load, changes, message):
    folder = data_files.write_images(tmp_path / "data")
    rows = [data_files.pair_row(0), data_files.pair_row(1) | changes]
    source = {"path": str(data_files.write_rows(folder, rows, "pairs.json")), "image_folder": str(folder)}
    flags = {"training.stage": 4, "data.sources": [source], "checkpoint.load": load, "model.tower": "clip-tiny"}
    run = load_run(flags=flags, overrides=[f"data.tokenizer={write_tokenizer(tmp_path / 'tokenizer')}"])
    with pytest.raises(ConfigError, match=message):
        validate(run, 1, CPU)
    validate_as_conversations = replace(run, training=replace(run.training, stage=2))
    with pytest.raises(ConfigError, match="conversations"):
        validate(validate_as_conversations, 1, CPU)


def test_numbers_of_preferences_have_rules():
    with pytest.raises(ConfigError, match=r"preference\.beta=0\.0 must be positive"):
        validate(tiny(training__stage=4, preference__beta=0.0), 1, CPU)
