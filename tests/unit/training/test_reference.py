"""The file of the reference's log-probabilities: of what it is, and what is refused. Layouts: tests/distributed."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from megatron_moellava import parallel
from megatron_moellava.checkpoint.description import RunDescription, read_description, write_description
from megatron_moellava.checkpoint.folders import require_checkpoint
from megatron_moellava.config import ConfigError, DataError, RunConfig
from megatron_moellava.data import media
from megatron_moellava.data.batch import pack
from megatron_moellava.data.sample import parse_record
from megatron_moellava.model.build import build_model
from megatron_moellava.model.inputs import model_inputs
from megatron_moellava.model.weights import load_weights
from megatron_moellava.training.reference import file_of, give_reference, read_log_probs, reference_key, reference_seal
from megatron_moellava.training.run import build_loader
from tests.helpers import data_files
from tests.helpers.inference_models import tiny_checkpoint
from tests.helpers.runs import over_rows, tiny

SOURCES = [{"path": "rows/pairs.json"}]


def checkpoint(folder: Path, **fields) -> Path:
    """Of a run's folder: what it says of itself, without its tensors; its only iteration folder."""
    iteration = folder / "iter_0000004"
    iteration.mkdir(parents=True)
    write_description(iteration, RunDescription(iteration=4, model={}, **fields))
    return iteration


def key_of(run, rows=("digest",)) -> dict:
    return reference_key(run, SimpleNamespace(content=list(rows)))


def test_the_file_lies_beside_the_data_under_the_digests_of_reference_and_rows(tmp_path):
    checkpoint(tmp_path / "one"), checkpoint(tmp_path / "two", stage=3)
    run = tiny(training__stage=4, data__sources=SOURCES, checkpoint__load=str(tmp_path / "one"))
    other = replace(run, checkpoint=replace(run.checkpoint, load=str(tmp_path / "two")))
    named = replace(run, preference=replace(run.preference, reference=str(tmp_path / "two")))
    keys = [key_of(run), key_of(other), key_of(run, ["other"])]
    files = [file_of(run, key) for key in keys]
    assert len(set(files)) == 3 and {file.parent for file in files} == {Path("rows/.moellava_index")}
    assert file_of(run, key_of(named)) == files[1], "preference.reference stands before checkpoint.load"
    given = replace(run, preference=replace(run.preference, log_probs="somewhere/x.safetensors"))
    assert file_of(given, keys[0]) == Path("somewhere/x.safetensors")


def test_a_file_of_something_else_is_refused(tmp_path):
    path, found_R2 = tmp_path / "x.safetensors", np.array([[-1.0, -2.0]], dtype=np.float32)
    save_file({"log_probs": found_R2}, path, {"of": '{"reference": "a", "rows": ["r"]}'})
    assert np.array_equal(read_log_probs(path, {"reference": "a", "rows": ["r"]}), found_R2)
    with pytest.raises(DataError, match=r"x.safetensors is of something else \(another reference\).*remove this one"):
        read_log_probs(path, {"reference": "b", "rows": ["r"]})
    with pytest.raises(DataError, match="another reference, another rows"):
        read_log_probs(path, {"reference": "b", "rows": ["s"]})


@pytest.mark.parametrize(
    "damage", [lambda path: path.write_bytes(path.read_bytes()[:20]), lambda path: save_file({}, path)]
)
def test_a_damaged_file_is_refused(tmp_path, damage):
    path = tmp_path / "x.safetensors"
    save_file({"log_probs": np.zeros((1, 2), np.float32)}, path, {"of": "{}"})
    damage(path)
    with pytest.raises(DataError, match=r"x.safetensors cannot be read .*; remove it"):
        read_log_probs(path, {})


def test_a_run_goes_on_with_the_reference_that_it_began_with(tmp_path):
    seal = read_description(checkpoint(tmp_path / "load")).checksum
    run = tiny(
        training__stage=4,
        checkpoint__load=str(tmp_path / "load"),
        checkpoint__save=str(tmp_path / "save"),
        data__sources=SOURCES,
    )
    assert reference_seal(run) == seal
    checkpoint(tmp_path / "save", stage=4, preference={"reference": seal, "shift": 0.5})
    assert reference_seal(run) == seal
    gone = replace(run, checkpoint=replace(run.checkpoint, load=None))
    assert reference_seal(gone) == seal, "the reference itself is needed no more"
    checkpoint(tmp_path / "other", stage=3)
    with pytest.raises(ConfigError, match=f"trained against the reference of seal {seal[:12]}"):
        reference_seal(replace(run, checkpoint=replace(run.checkpoint, load=str(tmp_path / "other"))))


def stage_4(tmp_path: Path, rows: list[dict]) -> RunConfig:
    path = data_files.write_rows(data_files.write_images(tmp_path / "data"), rows, "pairs.json")
    return over_rows(path, 4, tiny_checkpoint(tmp_path / "load"))


@torch.no_grad()
def alone(run: RunConfig, model, pipeline, record: dict, answer: str) -> float:
    """Log-probability of one answer: as a conversation of its own, in a row of its own, with pictures of its own."""
    pictures = [record["image"]] if "image" in record else record.get("images", [])
    question = "<image>\n" * len(pictures) + record["prompt"]
    row = {"images": pictures, "conversations": data_files.conversation(question, record[answer])}
    sample = pipeline.encoder(parse_record(row, origin="x"))
    folder = run.data.sources[0].image_folder
    pixels = [media.tiles(ref, folder, "x", pipeline.tower, run.data)[0] for ref in sample.images]
    batch = pack([sample], pixels, len(sample), pipeline.encoder.tokenizer.pad_id, pipeline.pixel_shape)
    return -float(model(**model_inputs(batch)).sum())


def test_log_probs_are_those_of_each_answer_alone(tmp_path):
    """Packed in pairs that share their pictures, and found again in the file by the next run."""
    rows = [data_files.pair_row(number) for number in range(5)]
    run = stage_4(tmp_path, rows)
    parallel.initialize(run.parallel, 1)
    loader = build_loader(run)
    state = torch.get_rng_state()
    seal = give_reference(run, loader, build_loader)
    assert torch.equal(torch.get_rng_state(), state), "computing them leaves no trace in what is drawn"
    found_R2 = loader.micro_batches.pipeline.reference_R2
    (model,), pipeline = build_model(run), loader.micro_batches.pipeline
    load_weights(require_checkpoint(run.checkpoint.load), [model])
    model.eval()
    expected = [[alone(run, model, pipeline, row, answer) for answer in ("chosen", "rejected")] for row in rows[:3]]
    np.testing.assert_allclose(found_R2[:3], expected, rtol=1e-5)
    assert found_R2.shape == (5, 2) and seal == reference_seal(run)
    (file,) = (tmp_path / "data" / ".moellava_index").glob("reference-*.safetensors")
    changed = file.stat().st_mtime_ns
    again = build_loader(run)
    give_reference(run, again, build_loader)
    assert np.array_equal(again.micro_batches.pipeline.reference_R2, found_R2)
    assert file.stat().st_mtime_ns == changed
    parallel.shutdown()
