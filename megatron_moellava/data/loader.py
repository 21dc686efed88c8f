"""The training loader: samples in the run's order, tokenised, packed or padded, for one data-parallel rank, resumable.

`Stream` says which samples make a micro-batch, `Pipeline` what happens to them, `MicroBatches` has worker processes do it.
The state is plain JSON and goes into the checkpoint; it is restored exactly or not at all.
"""

import gc
import hashlib
import logging
import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from megatron_moellava.config import DataConfig, DataError
from megatron_moellava.data.batch import Batch, from_wire
from megatron_moellava.data.encode import check_template
from megatron_moellava.data.encoder import Encoder
from megatron_moellava.data.lengths import counts_work, measured_lengths, tokens_of
from megatron_moellava.data.micro_batches import MicroBatches
from megatron_moellava.data.modality import check_sources, modality_plan
from megatron_moellava.data.order import ORDER, Items, Stream, sample_order
from megatron_moellava.data.packing import pack_epoch
from megatron_moellava.data.pipeline import Pipeline
from megatron_moellava.data.sample import KEYS
from megatron_moellava.data.sources import OpenSource, Reader, open_sources
from megatron_moellava.data.state import redistribute
from megatron_moellava.data.templates import get_template
from megatron_moellava.data.tokenizer import Tokenizer
from megatron_moellava.towers.branches import own_tower

_LOG = logging.getLogger(__name__)
SHARED_MEMORY_LOW = 64 * 2**20  # bytes free, as much as Docker gives a container in all
MAX_NAMED = 10  # rows named of each kind that is used all the same; further ones are only counted


class Batches(Iterator[Batch]):
    """What training asks of a loader beside batches; as it is, for batches that come from somewhere else."""

    num_bad = 0  # bad samples met in this epoch, on this rank

    def state_dict(self) -> dict:
        """What a checkpoint keeps of the source; nothing by default."""
        return {}

    def check_skipped(self, bad: int) -> None:
        """DataError if so many bad samples, of all ranks, are too many."""

    def untrained(self, samples: int) -> None:
        """So many of the last ones were in a step that was not applied."""


class Loader(Batches):
    """Endless iterator of Batch.

    `trained` counts the samples delivered, `seen` those and the skipped ones, `skipped` and `notes` count by reason.
    """

    def __init__(
        self,
        micro_batches: MicroBatches,
        fingerprint: dict,
        opened: list[OpenSource],
        *,
        num_samples: int,
        allowed: float,
        content: list | None = None,
        arranged: Callable[[list[int]], Items] | None = None,
    ):
        """`num_samples`: of one epoch, over all ranks; `allowed`: bad ones of it that do not stop the run; `content`: what
        the rows' tokens depend on, as JSON; `arranged`: which of some samples share a row, as in an epoch."""
        self.micro_batches, self._fingerprint = micro_batches, fingerprint
        self._iterator: Iterator[dict] | None = None
        self.duplicates = sum(entry.duplicates for entry in opened)  # rows whose id another row of their source has
        self.num_samples, self.rows = num_samples, sum(entry.rows for entry in opened)
        self.content, self.arranged = content, arranged
        self.seen = 0
        self.trained = 0
        self.skipped: Counter[str] = Counter()
        self.notes: Counter[str] = Counter()
        self.messages: list[str] = []  # of the samples skipped since the last batch
        self._allowed, self._bad_epoch = allowed, 0
        self._bad: set[int] = set()  # sample numbers, of the current epoch
        self._last_bad = ""
        self._named: dict[str, set[str]] = {}  # rows already named, by kind

    def counters(self) -> dict:
        """Plain data; those of several ranks add up (`summary`)."""
        counted: dict = {"seen": self.seen, "trained": self.trained}
        counted |= {"skipped": dict(self.skipped), "notes": dict(self.notes)}
        counted |= {"bad_epoch": self._bad_epoch, "bad": sorted(self._bad)}
        return counted | {"duplicates": self.duplicates, "epoch": self.num_samples}

    def close(self) -> None:
        """End the worker processes."""
        self._iterator = None

    def __del__(self):
        self.close()

    def __next__(self) -> Batch:
        self.messages = []
        batch, tries = None, 0
        while batch is None:  # a micro-batch whose samples are all bad is left out
            if tries > self.rows:
                raise DataError(f"the data set yields no sample: every row is bad; the last: {self._last_bad}")
            batch, tries = self._next(), tries + 1
        self.trained += len(batch.sample_ids)
        return batch

    def _next(self) -> Batch | None:
        try:
            if self._iterator is None:
                self._iterator = started(self.micro_batches)
            delivered = next(self._iterator)
        except DataError as error:  # from a worker process it comes wrapped into a traceback
            raise DataError(str(error).rpartition("DataError: ")[2].strip()) from None
        except (RuntimeError, OSError) as error:
            raise WorkerTrouble(worker_trouble(self._fingerprint["rank"], error)) from error
        events = delivered["events"]
        self.seen += events.seen
        for kind, message in events.notes:
            self.notes[kind] += 1
            named = self._named.setdefault(kind, set())
            if len(named) < MAX_NAMED and message not in named:
                named.add(message)
                further = "; further rows like it are only counted" if len(named) == MAX_NAMED else ""
                _LOG.warning("note: %s%s", message, further)
        if delivered["epoch"] > self._bad_epoch:
            self._bad_epoch, self._bad = delivered["epoch"], set()
        for reason, message, number in events.skipped:
            self._skip(reason, message, number)
        return delivered["batch"] and from_wire(delivered["batch"])

    def _skip(self, reason: str, message: str, number: int) -> None:
        self.skipped[reason] += 1
        self._bad.add(number)
        self._last_bad = message
        self.check_skipped(len(self._bad))
        self.messages.append(message)
        _LOG.warning("skipped: %s", message)

    @property
    def num_bad(self) -> int:  # type: ignore[override]
        """Bad samples met in this epoch, on this rank."""
        return len(self._bad)

    def check_skipped(self, bad: int) -> None:
        """DataError if `bad` samples of an epoch, of this rank or of all, are more than data.max_skip_share allows.

        The share is one of the whole data set: where the bad rows lie, and who reads them, does not matter.
        """
        if bad > self._allowed:
            share = f"{bad} of the {self.rows} rows are bad, more than data.max_skip_share allows; the last: "
            raise DataError(f"{share if self._allowed else ''}{self._last_bad}") from None

    def untrained(self, samples: int) -> None:
        """Take back `samples` of the count of trained ones: their step was skipped."""
        self.trained -= samples

    def rows_per_epoch(self) -> int:
        """Rows that one epoch fills over all ranks: packed rows, or else samples."""
        return self.micro_batches.items(0) if self._fingerprint["packing"] else self.num_samples

    def state_dict(self) -> dict:
        """JSON: what to restore, and what must be equal for that to make sense."""
        return {"fingerprint": self._fingerprint, "engine": self.micro_batches.save(), "counters": self.counters()}

    def load_states(self, saved: dict[int, dict]) -> None:
        """Continue from states by rank: this rank's own, or all of a run with another number of ranks.

        Exact or a DataError, as `redistribute` says.
        """
        now, (first, *_) = self._fingerprint, saved.values()
        if first and first["fingerprint"]["world_size"] != now["world_size"]:
            check_fingerprint(first["fingerprint"], now, ignore=("rank", "world_size"))
            states = redistribute([saved[rank] for rank in sorted(saved)], now["world_size"])
            saved = dict(enumerate(states))
        self.load_state_dict(saved[now["rank"]])

    def load_state_dict(self, saved: dict) -> None:
        """Continue exactly where `saved` was taken. Before the first batch only. Raises DataError, never guesses."""
        if self._iterator is not None:
            raise DataError("the loader already runs; restore its state before the first batch")
        check_fingerprint(saved.get("fingerprint"), self._fingerprint)
        try:
            self.micro_batches.restore(saved["engine"])
            counters = saved["counters"]
            self.seen, self.trained = counters["seen"], counters["trained"]
            self.skipped, self.notes = Counter(counters["skipped"]), Counter(counters["notes"])
            self._bad_epoch, self._bad = counters["bad_epoch"], set(counters["bad"])
        except (KeyError, TypeError, ValueError, AssertionError, AttributeError) as error:
            raise DataError(f"the loader's state cannot be restored ({error!r}); the checkpoint is damaged") from error


def started(micro_batches: MicroBatches) -> Iterator[dict]:
    """`iter(micro_batches)`, which forks the workers, where there are any.

    Garbage of this process (an earlier stage's trainer with its process groups and threads) must not be collected in a
    worker, where those threads do not exist: it would crash. So it is collected now, and the rest is out of bounds there.
    """
    if not micro_batches.num_workers:
        return iter(micro_batches)
    gc.collect()
    gc.freeze()
    try:
        return iter(micro_batches)
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
    """`trained 665,286 samples, 1.00 epochs of 665,298; read 665,298, skipped 12: 9 missing image, 3 unreadable image;
    noted 40 truncated`, over all ranks."""
    first = counters[0] if counters else {"duplicates": 0, "epoch": 0}  # every rank knows all sources
    total: dict[str, Counter[str]] = {"skipped": Counter(), "notes": Counter()}
    for found in counters:
        for kind, counter in total.items():
            counter.update(found[kind])
    listed = {kind: ", ".join(f"{n:,} {what}" for what, n in c.most_common()) for kind, c in total.items()}
    trained, seen = (sum(found[key] for found in counters) for key in ("trained", "seen"))
    text = (
        f"trained {trained:,} samples, {seen / max(first['epoch'], 1):.2f} epochs of {first['epoch']:,}; read {seen:,}"
    )
    text += f", skipped {total['skipped'].total():,}"
    text += f": {listed['skipped']}" if listed["skipped"] else ""
    text += f"; noted {listed['notes']}" if listed["notes"] else ""
    duplicates = first["duplicates"]
    return text + (f"; {duplicates:,} rows share their id with another row" if duplicates else "")


def check_fingerprint(saved: dict | None, now: dict, ignore: tuple[str, ...] = ()) -> None:
    """Raise DataError, naming the differences, unless `saved` describes the same data order as `now`."""
    if not saved:
        raise DataError("the checkpoint holds no loader state; start from its weights alone, with a new data order")
    keys = [key for key in (*now, *({*LATER, TOWERS} & saved.keys() - now.keys())) if key not in ignore]
    changed = [_difference(key, saved.get(key), now.get(key)) for key in keys if saved.get(key) != now.get(key)]
    if changed:
        raise DataError(
            "the data order cannot be continued, since these differ from the run that was saved: "
            + "; ".join(changed)
            + ". Use the same values, or start from the weights alone with a new data order"
        )


def _difference(key: str, then: object, now: object) -> str:
    if key != "sources" or not isinstance(then, list) or not isinstance(now, list):
        return f"{key}: {then!r} then, {now!r} now"
    if len(then) != len(now):
        return f"data.sources: {len(then)} data sets then, {len(now)} now"
    pairs = [(number, *pair) for number, pair in enumerate(zip(then, now, strict=True), start=1) if pair[0] != pair[1]]
    return "; ".join(
        f"set {number} of data.sources (digest of its rows x weight): {a} then, {b} now" for number, a, b in pairs
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
    tower_weight: float = 1.0,
    pairs: bool = False,
) -> Loader:
    """`data` is a DataConfig; `template` stands in when data.template is empty (the backbone's own).

    rank and world_size are data-parallel. `accumulation_steps` (micro-batches per step and rank) matters to the modality
    sampler, and where rows are dealt by cost. `context_length` is the backbone's: no sample is longer. `cache_folder` keeps the
    row indices (default: beside each JSON). `tower_weight`: of `costs/balance.py`, where pictures differ in cost
    (`lengths.counts_work`). `pairs`: the rows are pairs of answers. DataError where there are no rows to train on.
    """
    if not data.sources:
        raise DataError("data.sources is empty; name at least one LLaVA JSON or a folder of shards")
    if read := sorted({*data.ignore_keys} & {*KEYS}):
        raise DataError(f"data.ignore_keys={read} would drop what a row consists of; name other keys")
    encoder = build_encoder(data, tokenizer, tower, template, context_length)
    opened, notes = open_sources(data.sources, cache_folder)
    notes += [f"{entry.path}: {entry.duplicates_message}" for entry in opened if entry.duplicates]
    for note in notes if rank == 0 else ():
        _LOG.warning("%s", note)
    pipeline = Pipeline(Reader(opened), encoder, tower, data, pad_multiple=pad_multiple, pairs=pairs)
    fingerprint = order_fields(data, encoder, tower, opened)
    shares = [entry.share for entry in opened]
    content = _length_key(fingerprint, opened, data, tower) + ["pairs"] * pairs

    def plan(epoch: int) -> Items:
        return arranged(sample_order(shares, seed, epoch))

    group, arranged = 1, _alone
    cost: Callable[[Items], float] | None = None
    cache = cache_folder or Path(data.sources[0].path).expanduser().parent / ".moellava_index"
    if data.sampler == "modality_length":
        chunks = accumulation_steps * world_size
        plan = _modality(data, opened, seed, micro_batch_size, chunks, world_size)
        fingerprint |= {"micro_batch_size": micro_batch_size, "micro_batches_per_step": chunks}
    elif data.packing:
        arranged, cost = _packed(data, pipeline, content, cache, tower_weight)
    else:
        group, cost = micro_batch_size, _cost_of_padded(pipeline, content, cache, tower_weight)
        fingerprint |= {"cost": "padded rows and tower"} if cost else {}
    num_samples = len(sample_order(shares, seed, 0))
    if not num_samples:
        raise DataError("data.sources: an epoch holds no sample; raise the weights")
    visits = max(1, math.ceil(max(entry.weight for entry in opened)))  # of one row in an epoch, by several ranks
    stream = Stream(plan, group=group, rank=rank, world_size=world_size, cost=cost, rounds=accumulation_steps)
    return Loader(
        MicroBatches(pipeline, stream, num_workers=data.num_workers),
        fingerprint | {"seed": seed, "rank": rank, "world_size": world_size},
        opened,
        num_samples=num_samples,
        allowed=data.max_skip_share * sum(entry.rows for entry in opened) * visits,
        content=content,
        arranged=arranged,
    )


def _alone(samples: list[int]) -> Items:
    return [[number] for number in samples]


def _modality(data, opened: list[OpenSource], seed: int, micro_batch_size: int, chunks: int, world_size: int):
    check_sources(data, opened)
    lengths = np.concatenate([entry.required_index.lengths for entry in opened])

    def plan(epoch: int) -> Items:
        return modality_plan(
            lengths, seed=seed, epoch=epoch, micro_batch_size=micro_batch_size, chunks=chunks, world_size=world_size
        )

    return plan


def _packed(data, pipeline: Pipeline, key: list, cache: str | Path, tower_weight: float):
    """(rows of samples, what rows cost a rank or None where all that differs is attention)"""
    measured = measured_lengths(pipeline, key, cache)
    lengths = pipeline.measured = tokens_of(measured)
    costs = None if lengths is measured else lengths.astype(np.float64) ** 2 + tower_weight * measured[:, 1]

    def arranged(samples: list[int]) -> Items:
        own = None if costs is None else costs[samples].tolist()
        return pack_epoch(samples, lengths[samples].tolist(), data.seq_length, data.packing_buffer, own)

    return arranged, None if costs is None else lambda rows: float(sum(costs[row].sum() for row in rows))


def _cost_of_padded(pipeline: Pipeline, key: list, cache: str | Path, tower_weight: float):
    """What rows that are padded to the longest of them cost a rank; None where the tower's work follows from their tokens."""
    if not counts_work(pipeline):
        return None
    measured = measured_lengths(pipeline, key, cache).astype(np.float64)

    def cost(rows: Items) -> float:
        tokens, work = measured[[number for row in rows for number in row]].T
        return float(len(tokens) * tokens.max() ** 2 + tower_weight * work.sum())

    return cost


def _length_key(fingerprint: dict, opened: list[OpenSource], data, tower) -> list:
    """What the lengths of samples depend on; the rest of the fingerprint says which of them share a row."""
    fields = (
        "seq_length",
        "max_sample_length",
        "long_samples",
        "template",
        "label_mode",
        "tokenizer",
        "num_features",
        "max_images",
    )
    # Tiles, native resolution and the numbers of boxes depend on the pictures and on how they are shown.
    tiles = [[entry.folder for entry in opened], tower.image_size, data.image_aspect_ratio, data.image_grid]
    tiles += [fingerprint["native"]] if tower.has_grids else []
    tiles += [
        [item.name, own.image_size, own.num_features, own.hidden_size, own.num_used_layers]
        for item in data.modalities
        if (own := own_tower(item))
    ]
    seen = {name: fingerprint[name] for name in LATER if name in fingerprint}
    return [{name: fingerprint[name] for name in fields} | seen, [entry.fingerprint for entry in opened], tiles]


def build_encoder(data, tokenizer: Tokenizer, tower, template: str = "", context_length: int | None = None) -> Encoder:
    """The run's `Encoder`. ConfigError for an unknown template, or a tokenizer without its control tokens.

    `data`: DataConfig; `template`: the backbone's, where `data` names none; `context_length`: longest sample in
    tokens.
    """
    chosen = get_template(data.template or template)
    check_template(chosen, tokenizer)
    longest = min(data.seq_length, data.max_sample_length or context_length or data.seq_length)
    by_text = data.length_counts == "text"
    return Encoder(
        template=chosen,
        tokenizer=tokenizer,
        num_features=tower.num_features,
        max_length=data.seq_length if by_text else longest,
        text_length=longest if by_text else None,
        label_mode=data.label_mode,
        long_samples=data.long_samples,
    )


# Fields that older checkpoints do not know: in the fingerprint only where they are not the default, which was the only way.
LATER = ("box_format", "video_frames", "video_fps", "video_times", "video_pooling", "modalities")
TOWERS = "towers"  # likewise, of modalities with one of their own: name -> visual tokens of a picture


def order_fields(data, encoder: Encoder, tower, opened: list[OpenSource]) -> dict:
    """What decides which sample lands in which batch; a resumed run must have the same."""
    tokens = encoder.tokenizer.encode_text("The quick brown fox; <image> 12345")[0]
    towers = {item.name: own.num_features for item in data.modalities if (own := own_tower(item))}
    return (
        {
            "order": ORDER,
            "sources": [f"{entry.fingerprint} x {entry.weight}" for entry in opened],
            "sampler": data.sampler,
            "packing": data.packing,
            "packing_buffer": data.packing_buffer if data.packing else None,
            "seq_length": data.seq_length,
            "max_sample_length": encoder.max_length
            if encoder.text_length is None
            else f"{encoder.text_length} of text",
            "long_samples": data.long_samples,
            "template": encoder.template.version,
            "label_mode": data.label_mode,
            "tokenizer": hashlib.sha256(str((encoder.tokenizer.vocab_size, tokens)).encode()).hexdigest()[:16],
            "num_features": tower.num_features,
            "image_grid": data.image_grid,
            "max_images": data.max_images,
        }
        | _grid_fields(data, tower)
        | _later_fields(data)
        | ({"cost": "attention and tower"} if data.packing and (data.video_pooling != "none" or towers) else {})
        | ({TOWERS: towers} if towers else {})
    )


def _grid_fields(data, tower) -> dict:
    """What decides the lengths of pictures that differ in them; nothing for other towers, as in older checkpoints."""
    if not tower.native:
        return {"native": f"tiles of {tower.tiling} with ends of lines"} if tower.newline else {}
    budgets = [tower.num_features, data.max_sample_image_tokens, data.enlarge_images]
    return {"native": [tower.patch_size * tower.shuffle, *budgets]}


def _later_fields(data) -> dict:
    found = {name: getattr(data, name) for name in LATER if getattr(data, name) != getattr(DataConfig(), name)}
    # Which rows are bad depends on their names; what a picture shows, not on the order of samples.
    return found | ({"modalities": [item.name for item in data.modalities]} if data.modalities else {})
