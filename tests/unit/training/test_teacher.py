"""A teacher's logits, from the pass over the rows to the student's batches, in one process. Layouts: tests/distributed."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from megatron_moellava import parallel
from megatron_moellava.checkpoint.description import RunDescription, write_description
from megatron_moellava.checkpoint.folders import require_checkpoint
from megatron_moellava.config import ConfigError, DataError, DistillationConfig, RunConfig
from megatron_moellava.data.encode import IGNORE_INDEX
from megatron_moellava.data.teacher_logits import TeacherDescription, read_teacher, shard_path
from megatron_moellava.data.tokenizer import load_tokenizer
from megatron_moellava.model.build import build_model
from megatron_moellava.model.inputs import model_inputs
from megatron_moellava.model.weights import load_weights
from megatron_moellava.training.distillation import give_teacher
from megatron_moellava.training.run import build_loader
from megatron_moellava.training.teacher import make_teacher
from tests.helpers import data_files
from tests.helpers.inference_models import TOKENIZER, tiny_checkpoint
from tests.helpers.runs import over_rows

ROWS = 7


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> tuple[RunConfig, Path, int]:
    """(the teacher's run, its logits with the whole vocabulary, how many tokens that are)"""
    folder = tmp_path_factory.mktemp("teacher")
    data_files.write_images(folder / "data")
    path = data_files.write_rows(folder / "data", [data_files.row(n, None if n % 3 else "a.png") for n in range(ROWS)])
    run = over_rows(path, 2, tiny_checkpoint(folder / "load"))
    size = load_tokenizer(TOKENIZER).vocab_size
    make_teacher(run, folder / "logits", top_k=size, dtype="float32", rows_per_shard=3)
    return run, folder / "logits", size


def student(run: RunConfig, folder: Path, **options) -> RunConfig:
    distillation = DistillationConfig(teacher_logits=str(folder), **options)
    return replace(run, training=replace(run.training, distillation=distillation))


@torch.no_grad()
@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
def test_a_student_reads_what_its_teacher_says_of_each_label(written, packing):
    """Of rows that the teacher has seen packed in another order."""
    run, folder, _ = written
    run = replace(
        run, data=replace(run.data, packing=packing), training=replace(run.training, seed=5, micro_batch_size=1)
    )
    parallel.initialize(run.parallel, 1)
    loader = build_loader(run)
    assert give_teacher(student(run, folder), loader) == read_teacher(folder).digest
    (model,) = build_model(run)
    load_weights(require_checkpoint(run.checkpoint.load), [model])
    model.eval()
    seen: set[int] = set()
    while len(seen) < ROWS:
        batch = next(loader)
        seen |= {*batch.rows}
        is_label_BS = batch.labels_BS != IGNORE_INDEX
        logits_TV = model(**(model_inputs(batch) | {"labels_BS": None}))[is_label_BS]
        wanted_TV = logits_TV[:, : batch.teacher_ids_TK.shape[1]].log_softmax(dim=1)
        found_TV = torch.zeros_like(wanted_TV).scatter_(
            1, batch.teacher_ids_TK.long(), batch.teacher_log_probs_TC[:, :-1]
        )
        torch.testing.assert_close(found_TV, wanted_TV, rtol=1e-4, atol=1e-4)
        assert (batch.teacher_log_probs_TC[:, -1] == -torch.inf).all(), "the whole vocabulary leaves no rest"
    parallel.shutdown()


def test_an_interrupted_pass_goes_on_where_it_stopped(written, tmp_path, capsys):
    run, folder, size = written
    starts = list(read_teacher(folder).starts)
    assert starts == [0, 3, 6]
    before = {start: load_file(shard_path(folder, start)) for start in starts}
    shard_path(folder, 3).unlink()
    times = {start: shard_path(folder, start).stat().st_mtime_ns for start in (0, 6)}
    make_teacher(run, folder, top_k=size, dtype="float32", rows_per_shard=3)
    assert "(2 of 3 shards were there)" in capsys.readouterr().out
    assert times == {start: shard_path(folder, start).stat().st_mtime_ns for start in times}, "not computed again"
    again = load_file(shard_path(folder, 3))
    assert all(np.array_equal(again[name], before[3][name]) for name in again)


def test_another_command_does_not_go_on(written):
    run, folder, _ = written
    with pytest.raises(DataError, match="with another top_k, another dtype; give the same command as then"):
        make_teacher(run, folder, top_k=4, dtype="float16", rows_per_shard=3)
    with pytest.raises(DataError, match=r"--top-k 100000 is more than the tokenizer's \d+ tokens"):
        make_teacher(run, folder, top_k=100_000, dtype="float32", rows_per_shard=3)


def test_other_rows_and_other_logits_are_refused_before_the_run(written, tmp_path):
    run, folder, _ = written
    data_files.write_images(tmp_path)
    path = data_files.write_rows(tmp_path, [data_files.row(number) for number in range(ROWS)])
    parallel.initialize(run.parallel, 1)
    other = student(over_rows(path, 2, Path(run.checkpoint.load)), folder)
    with pytest.raises(DataError, match=r"is of something else \(another rows\)"):
        give_teacher(other, build_loader(other))
    saved = tiny_saved(tmp_path / "save", {"teacher": "0" * 64})
    goes_on = replace(student(run, folder), checkpoint=replace(run.checkpoint, save=str(saved)))
    with pytest.raises(ConfigError, match="was trained with the teacher's logits of digest 000000000000"):
        give_teacher(goes_on, build_loader(goes_on))
    parallel.shutdown()


def tiny_saved(folder: Path, distillation: dict) -> Path:
    iteration = folder / "iter_0000004"
    iteration.mkdir(parents=True)
    write_description(iteration, RunDescription(iteration=4, model={}, distillation=distillation))
    return folder


def test_a_row_that_was_cut_elsewhere_is_a_bad_row(written):
    run, folder, _ = written
    parallel.initialize(run.parallel, 1)
    pipeline = build_loader(run).micro_batches.pipeline
    longest = max(len(pipeline.encode(number)[0]) for number in range(ROWS))
    short = student(replace(run, data=replace(run.data, seq_length=longest - 1)), folder)
    loader = build_loader(short)
    give_teacher(short, loader)
    with pytest.raises(DataError, match=r"labels are not the \d+ that the teacher of .* has seen; .*data.seq_length"):
        for _ in range(ROWS):
            next(loader)
    parallel.shutdown()


def test_a_description_says_of_what_the_logits_are(written):
    _, folder, size = written
    description = read_teacher(folder)
    assert isinstance(description, TeacherDescription) and (description.rows, description.top_k) == (ROWS, size)
    assert description.labels["template"] == "v1" and description.computed["precision"] == "fp32"
