"""Shards of a teacher's logits: what is read is what was written, and only for the labels that it was written of."""

from dataclasses import replace

import numpy as np
import pytest

from megatron_moellava.config import DataError
from megatron_moellava.data.sample import BadSample
from megatron_moellava.data.teacher_logits import (
    DESCRIPTION,
    Taught,
    TeacherDescription,
    begin,
    checksum,
    label_key,
    missing,
    open_teacher,
    read_teacher,
    shard_path,
    write_shard,
)

LABELS = {"template": "v1", "label_mode": "spans", "tokenizer": "t", "rows": ["digest"]}
DESCRIBED = TeacherDescription(
    teacher="seal", computed={}, labels=LABELS, vocab_size=9, top_k=2, dtype="float32", rows=5, rows_per_shard=2
)


def labels_of(number: int) -> np.ndarray:
    return np.arange(number, dtype=np.int64) + 3  # row 0 has none


def taught_of(number: int) -> Taught:
    draw = np.random.default_rng(number)
    return Taught(draw.integers(0, 9, (number, 2)), draw.standard_normal((number, 3)))


def write(folder, description=DESCRIBED, left_out=()):
    for start in begin(folder, description):
        rows = {row: (checksum(labels_of(row)), taught_of(row)) for row in description.rows_of(start)}
        write_shard(folder, description, start, {row: found for row, found in rows.items() if row not in left_out})
    return folder


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_each_row_is_read_as_it_was_written(tmp_path, dtype):
    teacher = open_teacher(write(tmp_path / "x", replace(DESCRIBED, dtype=dtype)), LABELS, 9)
    for number in (3, 0, 4, 2, 1):
        read, wanted = teacher.read(number, labels_of(number), "x"), taught_of(number)
        assert read.log_probs_TC.dtype == dtype and read.ids_TK.shape == (number, 2)
        assert np.array_equal(read.ids_TK, wanted.ids_TK)
        np.testing.assert_allclose(read.log_probs_TC, wanted.log_probs_TC, rtol=1e-7 if dtype == "float32" else 1e-3)


def test_other_labels_than_the_teacher_has_seen_are_refused(tmp_path):
    teacher = open_teacher(write(tmp_path / "x"), LABELS, 9)
    for labels in (labels_of(3)[:2], labels_of(3)[::-1], labels_of(4)):
        with pytest.raises(BadSample, match=r"y row 3: its \d labels are not the 3 that the teacher .* has seen"):
            teacher.read(3, labels, "y row 3")


def test_a_row_that_the_teacher_could_not_read_is_named(tmp_path):
    teacher = open_teacher(write(tmp_path / "x", left_out=[3]), LABELS, 9)
    assert len(teacher.read(2, labels_of(2), "x").ids_TK) == 2
    with pytest.raises(BadSample, match="y row 3: could not be read when its teacher's logits were written"):
        teacher.read(3, labels_of(3), "y row 3")


def test_what_is_there_is_not_written_again(tmp_path):
    folder = write(tmp_path / "x")
    assert begin(folder, DESCRIBED) == missing(folder, DESCRIBED) == []
    shard_path(folder, 2).unlink()
    assert begin(folder, DESCRIBED) == [2]
    with pytest.raises(
        DataError, match="lacks 1 of 3 shards, the first with rows 2 to 3; give its moellava make-teacher"
    ):
        open_teacher(folder, LABELS, 9)


@pytest.mark.parametrize(
    ("changes", "what"), [({"teacher": "other"}, "teacher"), ({"top_k": 3}, "top_k"), ({"dtype": "float16"}, "dtype")]
)
def test_a_folder_of_something_else_is_not_continued(tmp_path, changes, what):
    folder = write(tmp_path / "x")
    with pytest.raises(DataError, match=f"with another {what}; give the same command as then"):
        begin(folder, replace(DESCRIBED, **changes))


def test_a_folder_that_is_used_otherwise_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(DataError, match=r"is not empty and holds no teacher\.json"):
        begin(tmp_path, DESCRIBED)


@pytest.mark.parametrize(
    ("labels", "vocab_size", "what"),
    [({"rows": ["other"]}, 9, "rows"), ({"template": "phi"}, 9, "template"), ({}, 8, "vocab_size"),
     ({"tokenizer": "u"}, 9, "tokenizer"), ({"box_format": "qwen"}, 9, "box_format")],
)  # fmt: skip
def test_a_student_of_something_else_is_refused(tmp_path, labels, vocab_size, what):
    folder = write(tmp_path / "x")
    with pytest.raises(DataError, match=rf"is of something else \(another {what}\): teacher and student must share"):
        open_teacher(folder, LABELS | labels, vocab_size)


def test_what_decides_labels_is_not_what_pictures_become():
    seen = {"template": "v1", "label_mode": "spans", "tokenizer": "t", "num_features": 16, "seq_length": 64}
    assert label_key([seen, ["digest"], ["tiles"]], ("box_format",)) == LABELS
    assert label_key([seen | {"box_format": "qwen"}, ["digest"]], ("box_format",)) == LABELS | {"box_format": "qwen"}


def test_damage_is_named(tmp_path):
    folder = write(tmp_path / "x")
    path = shard_path(folder, 2)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(DataError, match=r"rows-0000002\.safetensors cannot be read"):
        open_teacher(folder, LABELS, 9).read(3, labels_of(3), "x")
    write(tmp_path / "other", replace(DESCRIBED, teacher="other"))
    path.write_bytes(shard_path(tmp_path / "other", 2).read_bytes())
    with pytest.raises(DataError, match=r"does not belong to the teacher\.json beside it"):
        open_teacher(folder, LABELS, 9).read(3, labels_of(3), "x")


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "cannot be read"), ("{}", "cannot be read"), ('{"format": 7}', "has format 7, this version reads 1")],
)
def test_a_description_that_cannot_be_used_is_refused(tmp_path, content, message):
    (tmp_path / DESCRIPTION).write_text(content)
    with pytest.raises(DataError, match=message):
        read_teacher(tmp_path)
    with pytest.raises(DataError, match=r"holds no teacher's logits \(teacher\.json\)"):
        read_teacher(tmp_path / "nowhere")


def test_the_digest_is_of_everything():
    others = [replace(DESCRIBED, teacher="other"), replace(DESCRIBED, rows_per_shard=3), replace(DESCRIBED, top_k=1)]
    assert len({DESCRIBED.digest, *(other.digest for other in others)}) == 4
