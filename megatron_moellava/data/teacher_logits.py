"""A teacher's distribution over the vocabulary at every label of a data set, in shards: the likeliest tokens, and the rest.

    FOLDER/teacher.json             of which teacher and which rows, and how they are cut into shards
    FOLDER/rows-0000512.safetensors shard of `rows_per_shard` rows, the first of which is row 512 of the data set

Of each label of a row a shard holds the ids of the `top_k` likeliest tokens and C = K + 1 log-probabilities: theirs, and
that of all other tokens together, so that the probabilities of a label add up to 1 whatever K is. What belongs together is
found by the row's number and by a checksum of its labels, so that a student with another tower or longer rows can read
what its teacher has written, and a student with other labels cannot. Free of torch.

Suffixes: T labels of a row or of a shard's rows, K tokens, R rows.
"""

import hashlib
import json
import os
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from megatron_moellava.checkpoint.folders import write_durably
from megatron_moellava.config import DataError
from megatron_moellava.data.sample import BadSample

SHARDS_FORMAT = 1
DESCRIPTION = "teacher.json"
OF = "of"  # in a shard's metadata: the digest of the description that it belongs to
NO_LABELS = -1  # in place of a checksum: the row could not be used
OPEN_SHARDS = 16
ANEW = "write it anew with moellava make-teacher"


class Taught(NamedTuple):
    """Of the labels of one row."""

    ids_TK: np.ndarray  # int32
    log_probs_TC: np.ndarray  # fp16 or fp32; the last column is of all other tokens together


@dataclass(frozen=True, kw_only=True)
class TeacherDescription:
    """The content of teacher.json."""

    format: int = SHARDS_FORMAT
    teacher: str  # the seal of its checkpoint
    computed: dict  # what else the numbers depend on: the teacher's own view of the rows, and its precision
    labels: dict  # what decides the labels, and must be the student's too: `label_key`
    vocab_size: int  # of the tokenizer: ids are below this
    top_k: int
    dtype: str
    rows: int
    rows_per_shard: int

    @cached_property
    def digest(self) -> str:
        """Changes with everything that the shards depend on."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    @property
    def starts(self) -> range:
        """The first row of each shard."""
        return range(0, self.rows, self.rows_per_shard)

    def rows_of(self, start: int) -> range:
        """The rows of the shard that begins with row `start`."""
        return range(start, min(start + self.rows_per_shard, self.rows))


def shard_path(folder: Path, start: int) -> Path:
    """The file of the shard that begins with row `start`."""
    return folder / f"rows-{start:07d}.safetensors"


def label_key(content: list, later: tuple[str, ...]) -> dict:
    """What decides the labels of the rows, of `Loader.content`; `later`: names of fields that are only there where set."""
    seen, fingerprints, *_ = content
    names = ("template", "label_mode", "tokenizer", *later)
    return {name: seen[name] for name in names if name in seen} | {"rows": fingerprints}


def checksum(labels_T: np.ndarray) -> int:
    """Of the labels of one row, in their order."""
    return zlib.crc32(np.ascontiguousarray(labels_T, dtype="<i8").tobytes())


# --- writing --------------------------------------------------------------------------------------------------------------


def begin(folder: Path, description: TeacherDescription) -> list[int]:
    """Write teacher.json, or find it there; the first rows of the shards that are missing.

    DataError where the folder holds another teacher's, or something else.
    """
    path = folder / DESCRIPTION
    if path.exists():
        then, now = asdict(read_teacher(folder)), asdict(description)
        if differing := [name for name in now if then[name] != now[name]]:
            raise DataError(
                f"{folder} holds a teacher's logits with another {', another '.join(differing)}; give the same "
                "command as then to go on, or choose another folder"
            )
    elif folder.is_dir() and any(folder.iterdir()):
        raise DataError(f"{folder} is not empty and holds no {DESCRIPTION}; choose another folder")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        write_durably(path, json.dumps(asdict(description), indent=1).encode())
    return missing(folder, description)


def missing(folder: Path, description: TeacherDescription) -> list[int]:
    """The first rows of the shards that are not there: a shard gets its name when it is whole."""
    return [start for start in description.starts if not shard_path(folder, start).exists()]


def write_shard(
    folder: Path, description: TeacherDescription, start: int, found: Mapping[int, tuple[int, Taught]]
) -> None:
    """`found`: row -> (checksum of its labels, what the teacher says of them); rows that could not be used are not in it."""
    nothing = Taught(np.zeros((0, description.top_k)), np.zeros((0, description.top_k + 1)))
    rows = [found.get(number, (NO_LABELS, nothing)) for number in description.rows_of(start)]
    tensors: dict[str, np.ndarray] = {
        "labels_R": np.array([labels for labels, _ in rows], dtype=np.int64),
        "starts_R": np.cumsum([0, *(len(taught.ids_TK) for _, taught in rows)], dtype=np.int64),
        "ids_TK": np.concatenate([taught.ids_TK for _, taught in rows]).astype(np.int32),
        "log_probs_TC": np.concatenate([taught.log_probs_TC for _, taught in rows]).astype(description.dtype),
    }
    write_durably(shard_path(folder, start), save(tensors, {OF: description.digest}))


# --- reading --------------------------------------------------------------------------------------------------------------


def read_teacher(folder: Path) -> TeacherDescription:
    """Raises DataError where there is no teacher.json, or one that cannot be used."""
    path = folder / DESCRIPTION
    try:
        content = json.loads(path.read_text())
        if content["format"] != SHARDS_FORMAT:
            raise DataError(f"{path} has format {content['format']!r}, this version reads {SHARDS_FORMAT}; {ANEW}")
        return TeacherDescription(**{item.name: content[item.name] for item in fields(TeacherDescription)})
    except FileNotFoundError:
        raise DataError(f"{folder} holds no teacher's logits ({DESCRIPTION}); {ANEW}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} cannot be read ({error!r}); {ANEW}") from None


def incomplete(folder: Path, description: TeacherDescription) -> Iterator[str]:
    """What is missing in a folder, as a sentence; nothing where all shards are there."""
    absent = missing(folder, description)
    if absent:
        rows = description.rows_of(absent[0])
        yield (
            f"{folder} lacks {len(absent)} of {len(description.starts)} shards, the first with rows {rows.start} to "
            f"{rows[-1]}; give its moellava make-teacher command again, which goes on where it stopped"
        )


class TeacherLogits:
    """Reads rows by their number, in any process."""

    def __init__(self, folder: Path, description: TeacherDescription):
        self.folder, self.description = folder, description
        # Opened in the process that reads, the last ones used at the end.
        self._shards: OrderedDict[int, tuple] = OrderedDict()
        self._process = os.getpid()

    def read(self, number: int, labels_T: np.ndarray, origin: str) -> Taught:
        """What the teacher says of row `number`, whose labels these are. Raises BadSample where it has seen others."""
        start = number - number % self.description.rows_per_shard
        labels_R, starts_R, file = self._shard(start)
        row = number - start
        if labels_R[row] == NO_LABELS:
            raise BadSample("not taught", f"{origin}: could not be read when its teacher's logits were written; {ANEW}")
        begins, ends = (int(place) for place in starts_R[row : row + 2])
        if labels_R[row] != checksum(labels_T) or ends - begins != len(labels_T):
            raise BadSample(
                "other labels than the teacher's",
                f"{origin}: its {len(labels_T)} labels are not the {ends - begins} that the teacher of {self.folder} has "
                "seen; has the row changed, or was it cut elsewhere (data.seq_length, data.max_sample_length)?",
            )
        return Taught(file.get_slice("ids_TK")[begins:ends], file.get_slice("log_probs_TC")[begins:ends])

    def _shard(self, start: int) -> tuple:
        if self._process != os.getpid():
            self._shards, self._process = OrderedDict(), os.getpid()
        if start not in self._shards:
            self._shards[start] = self._opened(start)
            if len(self._shards) > OPEN_SHARDS:
                self._shards.popitem(last=False)
        self._shards.move_to_end(start)
        return self._shards[start]

    def _opened(self, start: int) -> tuple:
        path = shard_path(self.folder, start)
        try:
            file = safe_open(path, framework="numpy")
            of = (file.metadata() or {}).get(OF)
            shard = file.get_tensor("labels_R"), file.get_tensor("starts_R"), file
        except (SafetensorError, OSError) as error:
            raise DataError(f"{path} cannot be read ({error}); remove it, and {ANEW}") from None
        if of != self.description.digest or len(shard[0]) != len(self.description.rows_of(start)):
            raise DataError(f"{path} does not belong to the {DESCRIPTION} beside it; remove it, and {ANEW}")
        return shard


def open_teacher(folder: Path, labels: dict, vocab_size: int) -> TeacherLogits:
    """For rows whose labels are decided by `labels` (`label_key`). DataError where the teacher has seen something else."""
    description = read_teacher(folder)
    then, now = description.labels | {"vocab_size": description.vocab_size}, labels | {"vocab_size": vocab_size}
    if differing := sorted(name for name in {*then, *now} if then.get(name) != now.get(name)):
        raise DataError(
            f"training.distillation.teacher_logits={folder} is of something else (another {', another '.join(differing)}): "
            "teacher and student must share the tokenizer, the template and the rows; give the data that it was written of, "
            "or write it anew with moellava make-teacher"
        )
    if sentence := next(incomplete(folder, description), None):
        raise DataError(f"training.distillation.teacher_logits={sentence}")
    return TeacherLogits(folder, description)
