"""What an export says of how its model was trained and asked."""

import json

import pytest

from megatron_moellava.checkpoint.description import read_description
from megatron_moellava.checkpoint.folders import require_checkpoint
from megatron_moellava.config import ParallelConfig
from megatron_moellava.conversion.exports import export_checkpoint
from megatron_moellava.conversion.imports import import_checkpoint
from megatron_moellava.inference.load import inference_run
from tests.helpers.conversion_models import (
    TOWER,
    original_config,
    original_state,
    write_folder,
)
from tests.helpers.paths import ASSETS

UNSAID = {"template": "", "precision": ""}


@pytest.mark.parametrize("layout", ["original", "transformers"])
def test_how_it_wants_to_be_asked_travels(tmp_path, layout):
    """A conversation version other than the family's, and what is shown of a video."""
    data = {"template": "short", "video_frames": 4, "image_aspect_ratio": "square"}
    config = original_config("llama", "dense") | {"trained_with": {"data": data}}
    source = write_folder(tmp_path / "source", original_state("llama", "dense"), config)
    import_checkpoint(source, save=tmp_path / "run", tower=str(TOWER))
    export_checkpoint(tmp_path / "run", save=tmp_path / "out", layout=layout, tokenizer=ASSETS / "tok_spm")
    import_checkpoint(tmp_path / "out", save=tmp_path / "again", tower=str(TOWER) if layout == "original" else None)
    run = inference_run(
        require_checkpoint(tmp_path / "again"), ParallelConfig(), tokenizer=str(ASSETS / "tok_spm"), **UNSAID
    )
    assert {name: getattr(run.data, name) for name in data} == data


def test_a_language_model_alone_keeps_how_it_was_asked(tmp_path):
    """The conversation version and how boxes were written; with a projector beside it, whose own stage had another one."""
    data = {"template": "short", "box_format": "llava", "image_aspect_ratio": "square"}
    config = original_config("llama", "dense") | {"trained_with": {"data": data}}
    source = write_folder(tmp_path / "source", original_state("llama", "dense"), config)
    import_checkpoint(source, save=tmp_path / "run", tower=str(TOWER))
    export_checkpoint(tmp_path / "run", save=tmp_path / "out", layout="language-model")
    kept = {name: data[name] for name in ("template", "box_format")}
    assert json.loads((tmp_path / "out/config.json").read_text())["trained_with"] == {"data": kept}
    import_checkpoint(tmp_path / "out", save=tmp_path / "again")
    run = inference_run(
        require_checkpoint(tmp_path / "again"), ParallelConfig(), tokenizer=str(ASSETS / "tok_spm"), **UNSAID
    )
    assert {name: getattr(run.data, name) for name in kept} == kept
    export_checkpoint(tmp_path / "run", save=tmp_path / "projector", layout="projector")
    beside = tmp_path / "projector/config.json"
    other = json.loads(beside.read_text())
    other["trained_with"]["data"]["template"] = "plain"
    beside.write_text(json.dumps(other))
    projector = tmp_path / "projector/mm_projector.bin"
    import_checkpoint(tmp_path / "out", save=tmp_path / "both", tower=str(TOWER), projector=projector, verify=False)
    said = read_description(require_checkpoint(tmp_path / "both")).provenance["trained_with"]["data"]
    assert {name: said[name] for name in kept} == kept
