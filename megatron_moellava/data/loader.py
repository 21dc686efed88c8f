"""The training loader: sources blended, tokenised, packed or padded, sharded over data-parallel ranks, resumable.

Energon reads, shuffles, blends, buffers and remembers where it was; `Pipeline` says what happens to a sample. One loader
per data-parallel rank. Its state is plain JSON and goes into the checkpoint; it is restored exactly or not at all.
"""

import gc
import hashlib
import logging
import math
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from megatron_moellava.config import DataError
from megatron_moellava.data.batch import Batch, from_wire
from megatron_moellava.data.encode import check_template
from megatron_moellava.data.encoder import Encoder
from megatron_moellava.data.modality import LengthGroupedStream, Rows, check_sources
from megatron_moellava.data.pipeline import Pipeline
from megatron_moellava.data.sample import BadSample, parse_record
from megatron_moellava.data.sources import EnergonStream, OpenSource, open_source, peek_records
from megatron_moellava.data.state import redistribute
from megatron_moellava.data.templates import get_template
from megatron_moellava.data.tokenizer import Tokenizer

_LOG = logging.getLogger(__name__)
SHARED_MEMORY_LOW = 64 * 2**20  # bytes free, as much as Docker gives a container in all
MAX_PEEK_IMAGES = 10**6  # an estimate refuses no row
MAX_NAMED = 10  # rows named of each kind that is used all the same; further ones are only counted


class Loader:
    """Endless iterator of Batch. `skipped` and `notes` count samples by reason, `seen` all samples read."""

    def __init__(self, engine, fingerprint: dict, opened: list[OpenSource], encoder: Encoder):
        self._engine, self._fingerprint, self._iterator = engine, fingerprint, None
        self._opened, self._encoder = opened, encoder
        self.duplicates = sum(entry.duplicates for entry in opened)  # rows whose id another row of their source has
        self.num_samples = round(sum(entry.rows * entry.weight for entry in opened))  # of one epoch, over all ranks
        self.seen = 0
        self.skipped: Counter[str] = Counter()
        self.notes: Counter[str] = Counter()
        self.messages: list[str] = []  # of the samples skipped since the last batch
        self._named: dict[str, set[str]] = {}  # rows already named, by kind

    def counters(self) -> dict:
        """Plain data; those of several ranks add up (`summary`)."""
        counted = {"seen": self.seen, "skipped": dict(self.skipped), "notes": dict(self.notes)}
        return counted | {"duplicates": self.duplicates}

    def close(self) -> None:
        """End the worker processes."""
        self._iterator = None
        self._engine.close()

    def __del__(self):
        self.close()

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Batch:
        self.messages = []
        batch = None
        while batch is None:  # a micro-batch whose samples are all bad is left out
            batch = self._next()
        return batch

    def _next(self) -> Batch | None:
        try:
            if self._iterator is None:
                self._iterator = started(self._engine)
            delivered = next(self._iterator)
        except StopIteration:
            raise DataError("the data set yields no sample; is every row bad?") from None
        except DataError as error:  # from a worker process it comes wrapped into a traceback
            raise DataError(str(error).rpartition("DataError: ")[2].strip()) from None
        except (RuntimeError, OSError) as error:
            raise WorkerTrouble(worker_trouble(self._fingerprint["rank"], error)) from error
        events = delivered["events"]
        self.seen += events.seen
        self.skipped.update(reason for reason, _ in events.skipped)
        for kind, message in events.notes:
            self.notes[kind] += 1
            named = self._named.setdefault(kind, set())
            if len(named) < MAX_NAMED and message not in named:
                named.add(message)
                further = "; further rows like it are only counted" if len(named) == MAX_NAMED else ""
                _LOG.warning("note: %s%s", message, further)
        self.messages += [message for _, message in events.skipped]
        for _, message in events.skipped:
            _LOG.warning("skipped: %s", message)
        return delivered["batch"] and from_wire(delivered["batch"])

    def rows_per_epoch(self) -> int:
        """Rows that one epoch fills over all ranks: its samples; when packing an estimate, the same on every rank."""
        if not self._fingerprint["packing"]:
            return self.num_samples
        tokens = sum(entry.rows * entry.weight * mean_tokens(entry, self._encoder) for entry in self._opened)
        return max(1, math.ceil(tokens / self._fingerprint["seq_length"]))

    def state_dict(self) -> dict:
        """JSON: what to restore, and what must be equal for that to make sense."""
        return {"fingerprint": self._fingerprint, "engine": self._engine.save(), "counters": self.counters()}

    def load_states(self, saved: dict[int, dict]) -> None:
        """Continue from states by rank: this rank's own, or all of a run with another number of ranks.

        Exact or a DataError, as `redistribute` says.
        """
        now, (first, *_) = self._fingerprint, saved.values()
        if first and first["fingerprint"]["world_size"] != now["world_size"]:
            check_fingerprint(first["fingerprint"], now, ignore=("rank", "world_size", "num_workers"))
            states = redistribute([saved[rank] for rank in sorted(saved)], now["world_size"], now.get("num_workers"))
            saved = dict(enumerate(states))
        self.load_state_dict(saved[now["rank"]])

    def load_state_dict(self, saved: dict) -> None:
        """Continue exactly where `saved` was taken. Before the first batch only. Raises DataError, never guesses."""
        if self._iterator is not None:
            raise DataError("the loader already runs; restore its state before the first batch")
        check_fingerprint(saved.get("fingerprint"), self._fingerprint)
        try:
            self._engine.restore(saved["engine"])
            self.seen = saved["counters"]["seen"]
            self.skipped = Counter(saved["counters"]["skipped"])
            self.notes = Counter(saved["counters"]["notes"])
        except (KeyError, TypeError, ValueError, AssertionError, AttributeError) as error:
            raise DataError(f"the loader's state cannot be restored ({error!r}); the checkpoint is damaged") from error


def started(engine) -> Iterator:
    """`iter(engine)`, which forks the workers.

    Garbage of this process (an earlier stage's trainer with its process groups and threads) must not be collected in a
    worker, where those threads do not exist: it would crash. So it is collected now, and the rest is out of bounds there.
    """
    gc.collect()
    gc.freeze()
    try:
        return iter(engine)
    finally:
        gc.unfreeze()


class WorkerTrouble(RuntimeError):
    """A loader worker is gone or cannot work. Not a DataError: a new attempt may well go through."""


def worker_trouble(rank: int, error: Exception) -> str:
    """What `error`, from a loader worker that died or chokes, may mean."""
    shared = shutil.disk_usage("/dev/shm")
    text = f"the data loader of data-parallel rank {rank} failed: {error}"
    if shared.free < SHARED_MEMORY_LOW:
        return (
            f"{text}; /dev/shm, through which its worker processes hand over batches, has {shared.free / 2**20:.1f} of "
            f"{shared.total / 2**20:.1f} MiB free: start the container with --ipc=host or --shm-size=16g, or set "
            "data.num_workers=0"
        )
    return f"{text}; a worker that is killed has often used up the memory: fewer data.num_workers need less"


def summary(counters: list[dict]) -> str:
    """`read 665,298 samples, skipped 12: 9 missing image, 3 unreadable image; noted 40 truncated`, over all ranks."""
    duplicates = counters[0]["duplicates"] if counters else 0  # every rank knows all sources
    total: dict[str, Counter[str]] = {"skipped": Counter(), "notes": Counter()}
    for found in counters:
        for kind, counter in total.items():
            counter.update(found[kind])
    listed = {kind: ", ".join(f"{n:,} {what}" for what, n in c.most_common()) for kind, c in total.items()}
    text = f"read {sum(found['seen'] for found in counters):,} samples, skipped {total['skipped'].total():,}"
    text += f": {listed['skipped']}" if listed["skipped"] else ""
    text += f"; noted {listed['notes']}" if listed["notes"] else ""
    return text + (f"; {duplicates:,} rows share their id with another row" if duplicates else "")


def check_fingerprint(saved: dict | None, now: dict, ignore: tuple[str, ...] = ()) -> None:
    if not saved:
        raise DataError("the checkpoint holds no loader state; start from its weights alone, with a new data order")
    changed = [
        f"{key}: {saved.get(key)!r} then, {now[key]!r} now"
        for key in now
        if key not in ignore and saved.get(key) != now[key]
    ]
    if changed:
        raise DataError(
            "the data order cannot be continued, since these differ from the run that was saved: "
            + "; ".join(changed)
            + ". Use the same values, or start from the weights alone with a new data order"
        )


def build_train_loader(
    data,
    tokenizer: Tokenizer,
    tower,
    *,
    seed: int,
    rank: int,
    world_size: int,
    micro_batch_size: int,
    pad_multiple: int = 1,
    template: str = "",
    accumulation_steps: int = 1,
    context_length: int | None = None,
    cache_folder: str | Path | None = None,
) -> Loader:
    """`data` is a DataConfig; `template` stands in when data.template is empty (the backbone's own).

    rank and world_size are data-parallel. `accumulation_steps` (micro-batches per step and rank) matters to the
    modality sampler only. `context_length` is the backbone's: no sample is longer. `cache_folder` keeps the row indices
    (default: beside each JSON).
    """
    if not data.sources:
        raise DataError("data.sources is empty; name at least one LLaVA JSON or a folder of shards")
    encoder = build_encoder(data, tokenizer, tower, template, context_length)
    opened = [open_source(source, cache_folder) for source in data.sources]
    for source, entry in zip(data.sources, opened, strict=True):
        if entry.duplicates and rank == 0:
            _LOG.warning("%s: %s", source.path, entry.duplicates_message)
    pipeline = Pipeline(
        encoder,
        tower,
        data,
        folders=[source.image_folder or str(Path(source.path).parent) for source in data.sources],
        pad_multiple=pad_multiple,
    )
    fingerprint = order_fields(data, encoder, tower, opened, micro_batch_size)
    fingerprint |= {"seed": seed, "rank": rank, "world_size": world_size}
    share = {"seed": seed, "rank": rank, "world_size": world_size, "micro_batch_size": micro_batch_size}
    if data.sampler == "modality_length":
        engine = _length_grouped_stream(data, opened, pipeline, accumulation_steps, share)
        fingerprint |= {"micro_batches_per_step": accumulation_steps * world_size}
    else:
        engine = EnergonStream(data, opened, pipeline, cache_folder=cache_folder, **share)
        fingerprint |= {"num_workers": data.num_workers}
    return Loader(engine, fingerprint, opened, encoder)


def mean_tokens(entry: OpenSource, encoder: Encoder, count: int = 1000) -> float:
    """Tokens per sample of a source, of its first `count` rows; every image counted untiled."""
    lengths = []
    for record in peek_records(entry, count):
        try:
            lengths.append(len(encoder(parse_record(record, origin="row", max_images=MAX_PEEK_IMAGES))))
        except BadSample:
            continue
    return sum(lengths) / len(lengths) if lengths else 0.0


def build_encoder(data, tokenizer: Tokenizer, tower, template: str = "", context_length: int | None = None) -> Encoder:
    chosen = get_template(data.template or template)
    check_template(chosen, tokenizer)
    return Encoder(
        template=chosen,
        tokenizer=tokenizer,
        num_features=tower.num_features,
        max_length=min(data.seq_length, data.max_sample_length or context_length or data.seq_length),
        label_mode=data.label_mode,
        long_samples=data.long_samples,
    )


def _length_grouped_stream(data, opened: list[OpenSource], pipeline: Pipeline, accumulation_steps: int, share: dict):
    check_sources(data)
    indices = [entry.index for entry in opened if entry.index is not None]
    if len(indices) != len(opened):
        raise DataError("data.sampler=modality_length needs to know all lengths: use LLaVA JSON files, not shards")
    lengths = [index.lengths for index in indices]
    return LengthGroupedStream(
        Rows(indices, pipeline),
        [length for part in lengths for length in part],
        chunks=share["world_size"] * accumulation_steps,
        num_workers=data.num_workers,
        **share,
    )


def order_fields(data, encoder: Encoder, tower, opened: list[OpenSource], micro_batch_size: int) -> dict:
    """What decides which sample lands in which batch; a resumed run must have the same."""
    tokens = encoder.tokenizer.encode_text("The quick brown fox; <image> 12345")[0]
    return {
        "sources": [f"{entry.fingerprint} x {entry.weight}" for entry in opened],
        "sampler": data.sampler,
        "packing": data.packing,
        "packing_buffer": data.packing_buffer if data.packing else None,
        "micro_batch_size": micro_batch_size,
        "seq_length": data.seq_length,
        "max_sample_length": encoder.max_length,
        "long_samples": data.long_samples,
        "template": encoder.template.version,
        "label_mode": data.label_mode,
        "tokenizer": hashlib.sha256(str((encoder.tokenizer.vocab_size, tokens)).encode()).hexdigest()[:16],
        "num_features": tower.num_features,
        "image_grid": data.image_grid,
        "max_images": data.max_images,
    }
