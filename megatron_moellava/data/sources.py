"""Sources on disk -> Energon's blended, sharded, savable stream."""

import contextlib
import hashlib
import io
import itertools
import json
import os
import tarfile
from dataclasses import dataclass
from pathlib import Path

import yaml

from megatron_moellava.config import DataError
from megatron_moellava.data import state
from megatron_moellava.data.index import Index, index_json
from megatron_moellava.data.pipeline import Pipeline

from megatron.energon import WorkerConfig, get_savable_loader, get_train_dataset
from megatron.energon.errors import reraise_exception

MAX_SLICES = 50_000  # of a worker and source; the state remembers each until it is opened
SHARD_SLICE = 32  # samples read in sequence from a tar
WATCHDOG_SECONDS = 300
CHECKPOINT_SECONDS = 5  # between a worker's own snapshots; a resume repeats what was read since the last


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenSource:
    path: str  # what Energon opens
    rows: int
    weight: float  # times per epoch
    fingerprint: str
    index: Index | None  # None: shards
    duplicates: int = 0  # rows whose id another row has too
    duplicates_message: str = ""


def open_source(source, cache_folder: str | Path | None) -> OpenSource:
    path = Path(source.path)
    if path.is_dir():
        return _open_shards(path, source.weight)
    index = index_json(path, cache_folder or path.parent / ".moellava_index")
    return OpenSource(
        path=str(index.path.resolve()),
        rows=index.rows,
        weight=source.weight,
        fingerprint=index.fingerprint,
        index=index,
        duplicates=index.duplicates,
        duplicates_message=index.duplicates_message,
    )


def peek_records(entry: OpenSource, count: int):
    """The first rows of a source, which are in random order: LLaVA records, or None for what is not one."""
    if entry.index is not None:
        with open(entry.index.path, "rb") as file:
            yield from (json.loads(line).get("record") for line in itertools.islice(file, count))
        return
    with tarfile.open(sorted(Path(entry.path).rglob("*.tar"))[0], "r:") as tar:
        members = (member for member in tar if member.name.endswith(".json"))
        for member in itertools.islice(members, count):
            yield json.loads(tar.extractfile(member).read())


def _open_shards(path: Path, weight: float) -> OpenSource:
    found = [path / ".nv-meta" / name for name in (".info.json", ".info.yaml")]
    info = next((file for file in found if file.exists()), None)
    if info is None:
        raise DataError(
            f"data.sources.path={path} is a folder without Energon's .nv-meta; "
            "make shards with tools/prepare_data.py, or run `energon prepare` on existing ones"
        )
    counts = yaml.safe_load(info.read_text())["shard_counts"]
    digest = hashlib.sha256(json.dumps(counts, sort_keys=True).encode()).hexdigest()[:16]
    rows = sum(counts.values())
    report = path / "report.json"  # of tools/prepare_data.py
    known = json.loads(report.read_text()) if report.exists() else {}
    return OpenSource(
        path=str(path.resolve()),
        rows=rows,
        weight=weight,
        fingerprint=digest,
        index=None,
        duplicates=known.get("rows_with_duplicate_id", 0),
        duplicates_message=known.get("duplicates_message", ""),
    )


class EnergonStream:
    """Endless {"batch", "events"} of one data-parallel rank."""

    def __init__(self, data, opened: list[OpenSource], pipeline: Pipeline, *, cache_folder, **share):
        consumers = share["world_size"] * max(1, data.num_workers)
        _check_rows(data, opened, consumers, share["world_size"])
        workers = WorkerConfig(
            rank=share["rank"],
            world_size=share["world_size"],
            num_workers=data.num_workers,
            seed_offset=share["seed"],
            global_error_handler=reraise_exception,
        )
        folder = Path(cache_folder) if cache_folder else Path(data.sources[0].path).parent / ".moellava_index"
        with contextlib.redirect_stdout(io.StringIO()):  # Energon prints every worker's slices
            dataset = get_train_dataset(
                _write_blend(opened, folder),
                worker_config=workers,
                task_encoder=pipeline,
                batch_size=None if data.packing else share["micro_batch_size"],
                packing_buffer_size=data.packing_buffer if data.packing else None,
                shuffle_buffer_size=None,
                max_samples_per_sequence=_slice_length(opened, consumers),
            )
        self._loader = get_savable_loader(
            dataset,
            checkpoint_every_sec=CHECKPOINT_SECONDS,
            gc_collect_every_n_steps=100 if data.num_workers else 0,  # without workers it is the trainer's own heap
            watchdog_timeout_seconds=WATCHDOG_SECONDS,
        )
        self._loader.pin_memory = False  # the training loop moves batches

    def __iter__(self):
        return iter(self._loader)

    def close(self) -> None:
        """Left to the garbage collector, every worker would take five seconds to notice."""
        workers = self._loader._iterator
        if workers is not None and self._loader.num_workers:
            workers._shutdown_workers()

    def save(self) -> dict:
        return state.to_json(self._loader.save_state_rank())

    def restore(self, saved: dict) -> None:
        self._loader.restore_state_rank(state.from_json(saved))


def _check_rows(data, opened: list[OpenSource], consumers: int, world_size: int) -> None:
    for source, entry in zip(data.sources, opened, strict=True):
        if entry.rows < consumers:
            raise DataError(
                f"data.sources.path={source.path} holds {entry.rows} rows for {consumers} workers "
                f"({world_size} ranks x data.num_workers={data.num_workers}); use fewer workers or more rows"
            )


def _slice_length(opened: list[OpenSource], consumers: int) -> int:
    """Rows read in sequence: single ones from a JSON (a full shuffle), runs from a tar."""
    if any(entry.index is None for entry in opened):
        return SHARD_SLICE
    return max(1, -(-max(entry.rows for entry in opened) // (consumers * MAX_SLICES)))


def _write_blend(opened: list[OpenSource], folder: Path) -> str:
    """Energon's metadataset file; every row of a source is seen `weight` times per epoch."""
    blend = [
        {
            "path": entry.path,
            "repetitions": entry.weight if entry.weight % 1 else int(entry.weight),
            "subflavors": {"source": number},
        }
        for number, entry in enumerate(opened)
    ]
    splits = {"train": {"blend_epochized": blend}}
    text = yaml.safe_dump({"__module__": "megatron.energon", "__class__": "MetadatasetV2", "splits": splits})
    path = folder / f"blend-{hashlib.sha256(text.encode()).hexdigest()[:16]}.yaml"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        work = path.with_suffix(f".{os.uname().nodename}.{os.getpid()}")
        work.write_text(text)
        work.rename(path)
    return str(path.resolve())
