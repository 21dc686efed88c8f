"""The scripts of examples/ with every backbone: what they ask tools/train.py to check is a valid run, or a clear mistake."""

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_moellava.backbones import BACKBONES
from megatron_moellava.commands import train
from megatron_moellava.config import ConfigError
from megatron_moellava.validation.run import load_run, validate
from tests.helpers import data_files
from tests.helpers.made_tokenizer import write_tokenizer
from tests.helpers.paths import REPO
from tests.helpers.scripts import validate_only


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    return data_files.make_set(write_tokenizer(tmp_path_factory.mktemp("rows")), 8)


def asked(backbone: str, stage: int, folder: Path, stub: Path, rows: Path, **variables: str):
    """The run that the stage's script asks to validate."""
    settings = {"DATA": str(rows), "IMAGES": str(rows.parent), "TOKENIZER": str(rows.parent), "LOAD": ""}
    settings |= {"SAVE": str(folder / "save"), "BACKBONE": backbone, **variables}
    result, words = validate_only(f"train_stage{stage}.sh", folder, stub, **settings)
    assert result.returncode == 0, result.stderr
    arguments = train.parse_arguments(words[1:])
    assert arguments.validate_only
    return load_run(config=arguments.config, flags=train.flags(arguments), overrides=arguments.overrides)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_backbone_passes_the_check_of_every_stage(backbone, stage, tmp_path, stub, rows):
    run, own = asked(backbone, stage, tmp_path, stub, rows), BACKBONES[backbone].moe
    assert (run.model.backbone, run.training.stage) == (backbone, stage)
    assert (run.moe is not None) == (stage == 3 or own is not None)
    if stage == 3 and own is not None:  # the recipe makes experts of a dense model
        with pytest.raises(ConfigError, match=f"moe.router=original: {backbone} has experts of its own, with megatron"):
            validate(run, world_size=8)
        run = replace(run, moe=own)
    validate(run, world_size=8)


@pytest.mark.parametrize(
    ("variables", "world_size", "says"),
    [
        ({"DATA": "/nowhere.json"}, 8, "/nowhere.json does not exist"),
        ({"IMAGES": "/nowhere"}, 8, "/nowhere is not a folder"),
        ({"LOAD": "/nowhere/base"}, 8, "/nowhere/base holds no complete checkpoint"),
        ({"TOKENIZER": "/nowhere/tokenizer"}, 8, "/nowhere/tokenizer does not exist"),
        ({"TOWER": "clip-huge"}, 8, "clip-huge"),
        ({"SAVE": str(REPO / "README.md/save")}, 8, "README.md is not a folder"),
        ({}, 7, "must be a multiple of"),
    ],
)
def test_mistakes_are_found_by_the_check(variables, world_size, says, tmp_path, stub, rows):
    run = asked("phi-2", 2, tmp_path, stub, rows, **variables)
    with pytest.raises(ConfigError, match=says):
        validate(run, world_size)
