"""What is said of a run with a teacher before a weight is touched."""

import json

import pytest

from megatron_moellava.config import ConfigError
from megatron_moellava.data.teacher_logits import TeacherDescription, begin, shard_path
from megatron_moellava.data.templates import get_template
from megatron_moellava.validation.distillation import distillation_problems
from megatron_moellava.validation.run import load_run, validate
from tests.helpers.made_tokenizer import write_tokenizer
from tests.helpers.runs import tiny
from tests.unit.validation.test_problems import CPU

VOCABULARY = 9


def folder_of(folder, shards=(0, 4), **changes) -> str:
    """Of a teacher's logits, whose shards are empty files: their content is read where the run begins."""
    fields = {"teacher": "seal", "computed": {}, "labels": {"template": "v1", "label_mode": "spans"}, "rows": 8}
    fields |= {"vocab_size": VOCABULARY, "top_k": 2, "dtype": "float32", "rows_per_shard": 4}
    begin(folder, TeacherDescription(**(fields | changes)))
    for start in shards:
        shard_path(folder, start).touch()
    return str(folder)


def spoken(folder: str, **fields) -> str:
    run = tiny(**{"training__distillation": {"teacher_logits": folder}, "data__template": "v1"} | fields)
    return "\n".join(distillation_problems(run, get_template(run.data.template)))


def test_a_run_with_a_teacher_is_right(tmp_path):
    folder = folder_of(tmp_path / "x")
    assert spoken(folder) == "" and spoken(folder, training__stage=2, moe=None) == ""
    assert list(distillation_problems(tiny(), None)) == []


@pytest.mark.parametrize("stage", [1, 4])
def test_stages_without_a_teacher(tmp_path, stage):
    said = spoken(folder_of(tmp_path / "x"), training__stage=stage)
    assert said == f"training.distillation is about stages 2 and 3, and this is stage {stage}; leave it out"


def test_logits_that_are_not_there(tmp_path):
    assert "teacher_logits=nowhere holds no teacher's logits" in spoken("nowhere")
    assert "lacks 1 of 2 shards, the first with rows 4 to 7" in spoken(folder_of(tmp_path / "half", shards=(0,)))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"template": "phi", "label_mode": "spans"}, "was written with data.template=phi, and this run has v1"),
        (
            {"template": "v1", "label_mode": "original"},
            "was written with data.label_mode=original, and this run has spans",
        ),
    ],
)
def test_labels_that_are_made_otherwise(tmp_path, labels, message):
    assert message in spoken(folder_of(tmp_path / "x", labels=labels))


def test_another_tokenizer(tmp_path):
    tokenizer = str(write_tokenizer(tmp_path / "tokenizer"))
    said = spoken(folder_of(tmp_path / "x"), data__tokenizer=tokenizer)
    assert f"is of a tokenizer with {VOCABULARY} tokens, and data.tokenizer={tokenizer} has" in said
    assert "must share the tokenizer" in said
    size = int(said.split(" has ")[1].split(":")[0])
    assert spoken(folder_of(tmp_path / "y", vocab_size=size), data__tokenizer=tokenizer) == ""


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": 0.0}, r"training\.distillation\.temperature=0\.0 must be positive"),
        ({"weight": 1.5}, r"training\.distillation\.weight=1\.5 must lie between 0 and 1"),
        ({"weight": -0.1}, r"training\.distillation\.weight=-0\.1 must lie between 0 and 1"),
    ],
)
def test_numbers_have_rules(tmp_path, fields, message):
    folder = folder_of(tmp_path / "x")
    with pytest.raises(ConfigError, match=message):
        validate(tiny(training__distillation={"teacher_logits": folder} | fields), 1, CPU)


def test_a_run_says_all_of_it_at_once(tmp_path):
    flags = {"training.stage": 1, "model.backbone": "llama-tiny", "model.tower": "clip-tiny"}
    with pytest.raises(ConfigError, match=r"training\.distillation\.teacher_logits is required"):
        load_run(flags=flags, overrides=["training.distillation.weight=0.5"])
    run = load_run(flags=flags, overrides=[f"training.distillation={json.dumps({'teacher_logits': 'nowhere'})}"])
    with pytest.raises(ConfigError, match="and this is stage 1; leave it out"):
        validate(run, 1, CPU)
