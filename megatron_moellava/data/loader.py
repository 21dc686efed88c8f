"""The training loader: sources blended, tokenised, packed or padded, sharded over data-parallel ranks, resumable.

Energon reads, shuffles, blends, buffers and remembers where it was; `Pipeline` says what happens to a sample. One loader
per data-parallel rank. Its state is plain JSON and goes into the checkpoint; it is restored exactly or not at all.
"""

import contextlib
import hashlib
import io
import json
import os
from collections import Counter
from pathlib import Path

import yaml

from megatron_moellava.config import DataError
from megatron_moellava.data import state
from megatron_moellava.data.batch import Batch
from megatron_moellava.data.encode import Encoder, check_template
from megatron_moellava.data.index import index_json
from megatron_moellava.data.pipeline import Pipeline
from megatron_moellava.data.templates import get_template
from megatron_moellava.data.tokenizer import Tokenizer

MAX_SLICES = 50_000  # of a worker and source; each is remembered in the state until it is opened
SHARD_SLICE = 32  # samples read in sequence from a tar
WATCHDOG_SECONDS = 300


class Loader:
    """Endless iterator of Batch. `skipped` and `notes` count by reason, `seen` counts samples read."""

    def __init__(self, energon, fingerprint: dict, num_samples: int):
        self._energon, self._fingerprint = energon, fingerprint
        self._iterator = None
        self.num_samples = num_samples  # rows of one epoch over all ranks, weights included
        self.seen = 0
        self.skipped: Counter[str] = Counter()
        self.notes: Counter[str] = Counter()
        self.messages: list[str] = []  # one per skipped sample of the last batch

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Batch:
        if self._iterator is None:
            self._iterator = iter(self._energon)
        try:
            delivered = next(self._iterator)
        except StopIteration:
            raise DataError("the data set yields no sample: every row is bad or a worker has none") from None
        except DataError as error:  # from a worker it comes wrapped into a traceback
            raise DataError(str(error).rpartition("DataError: ")[2].strip()) from None
        events = delivered["events"]
        self.seen += events.seen
        self.skipped.update(reason for reason, _ in events.skipped)
        self.notes.update(events.notes)
        self.messages = [message for _, message in events.skipped]
        return delivered["batch"]

    def state_dict(self) -> dict:
        """JSON: what to restore, and what must be equal for that to make sense."""
        return {
            "fingerprint": self._fingerprint,
            "energon": state.to_json(self._energon.save_state_rank()),
            "counters": {"seen": self.seen, "skipped": dict(self.skipped), "notes": dict(self.notes)},
        }

    def load_state_dict(self, saved: dict) -> None:
        """Continue exactly where `saved` was taken. Before the first batch only. Raises DataError, never guesses."""
        if self._iterator is not None:
            raise DataError("the loader already runs; restore its state before the first batch")
        check_fingerprint(saved.get("fingerprint"), self._fingerprint)
        try:
            self._energon.restore_state_rank(state.from_json(saved["energon"]))
        except (KeyError, TypeError, ValueError, AssertionError) as error:
            raise DataError(f"the loader's state cannot be restored ({error!r}); the checkpoint is damaged") from error
        self.seen = saved["counters"]["seen"]
        self.skipped = Counter(saved["counters"]["skipped"])
        self.notes = Counter(saved["counters"]["notes"])


def check_fingerprint(saved: dict | None, now: dict) -> None:
    if saved is None:
        raise DataError("the checkpoint holds no loader state; start without it, or from the weights alone")
    changed = [f"{key}: {saved.get(key)!r} then, {now.get(key)!r} now" for key in now if saved.get(key) != now.get(key)]
    if changed:
        raise DataError(
            "the data order cannot be continued, since these differ from the run that was saved: "
            + "; ".join(changed)
            + ". Use the same values, or start from the weights alone with a fresh data order"
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
    template: str | None = None,
    cache_folder: str | Path | None = None,
) -> Loader:
    """`data` is a DataConfig; `template` stands in when data.template is empty (the backbone's own).

    rank and world_size are data-parallel. `cache_folder` keeps the row indices (default: beside each JSON).
    """
    encoder = build_encoder(data, tokenizer, tower, template)
    if data.sampler == "modality_length":
        from megatron_moellava.data.modality import ModalityLoader

        return ModalityLoader(
            data,
            encoder,
            tower,
            seed=seed,
            rank=rank,
            world_size=world_size,
            micro_batch_size=micro_batch_size,
            pad_multiple=pad_multiple,
            cache_folder=cache_folder,
        )
    return _energon_loader(data, encoder, tower, seed, rank, world_size, micro_batch_size, pad_multiple, cache_folder)


def build_encoder(data, tokenizer: Tokenizer, tower, template: str | None = None) -> Encoder:
    chosen = get_template(data.template or template or "")
    check_template(chosen, tokenizer)
    return Encoder(
        template=chosen,
        tokenizer=tokenizer,
        num_features=tower.num_features,
        seq_length=data.seq_length,
        label_mode=data.label_mode,
    )


def _energon_loader(data, encoder, tower, seed, rank, world_size, micro_batch_size, pad_multiple, cache_folder):
    from megatron.energon import WorkerConfig, get_savable_loader, get_train_dataset
    from megatron.energon.errors import reraise_exception

    blend = [open_source(source, cache_folder) for source in data.sources]
    if not blend:
        raise DataError("data.sources is empty; name at least one LLaVA JSON or a folder of shards")
    workers = WorkerConfig(
        rank=rank,
        world_size=world_size,
        num_workers=data.num_workers,
        seed_offset=seed,
        global_error_handler=reraise_exception,
    )
    consumers = world_size * max(1, data.num_workers)
    for source, entry in zip(data.sources, blend, strict=True):
        if entry["rows"] < consumers:
            raise DataError(
                f"data.sources.path={source.path} holds {entry['rows']} rows for {consumers} workers "
                f"({world_size} ranks x data.num_workers={data.num_workers}); use fewer workers or more rows"
            )
    pipeline = Pipeline(
        encoder,
        tower,
        data,
        folders=[source.image_folder or str(Path(source.path).parent) for source in data.sources],
        micro_batch_size=micro_batch_size,
        pad_multiple=pad_multiple,
    )
    rows = sum(entry["rows"] for entry in blend)
    with contextlib.redirect_stdout(io.StringIO()):  # Energon prints every worker's slices
        dataset = get_train_dataset(
            _write_blend(data, blend, cache_folder),
            worker_config=workers,
            task_encoder=pipeline,
            batch_size=None if data.packing else micro_batch_size,
            packing_buffer_size=data.packing_buffer if data.packing else None,
            shuffle_buffer_size=None,
            max_samples_per_sequence=_slice_length(blend, rows, consumers),
        )
    energon = get_savable_loader(
        dataset,
        checkpoint_every_sec=5,
        gc_collect_every_n_steps=100 if data.num_workers else 0,
        watchdog_timeout_seconds=WATCHDOG_SECONDS,
    )
    energon.pin_memory = False  # the training loop moves batches
    fingerprint = {
        "sources": [
            f"{entry['fingerprint']} x {source.weight}" for source, entry in zip(data.sources, blend, strict=True)
        ],
        "seed": seed,
        "rank": rank,
        "world_size": world_size,
        "num_workers": data.num_workers,
        **_order_fields(data, encoder, tower, micro_batch_size),
    }
    return Loader(
        energon, fingerprint, round(sum(e["rows"] * s.weight for s, e in zip(data.sources, blend, strict=True)))
    )


def _order_fields(data, encoder: Encoder, tower, micro_batch_size: int) -> dict:
    """What decides which sample lands in which batch."""
    tokens = encoder.tokenizer.encode_text("The quick brown fox; <image> 12345")[0]
    return {
        "packing": data.packing,
        "packing_buffer": data.packing_buffer if data.packing else None,
        "micro_batch_size": micro_batch_size,
        "seq_length": data.seq_length,
        "template": encoder.template.version,
        "label_mode": data.label_mode,
        "tokenizer": hashlib.sha256(str((encoder.tokenizer.vocab_size, tokens)).encode()).hexdigest()[:16],
        "num_features": tower.num_features,
        "max_images": data.max_images,
    }


def open_source(source, cache_folder: str | Path | None) -> dict:
    """Energon's path of a source, its number of rows, and its fingerprint."""
    path = Path(source.path)
    if path.is_dir():
        return _open_shards(path)
    index = index_json(path, cache_folder or path.parent / ".moellava_index")
    return {"path": str(index.path), "rows": index.rows, "fingerprint": index.fingerprint, "shards": False}


def _open_shards(path: Path) -> dict:
    info = path / ".nv-meta" / ".info.json"
    info = info if info.exists() else info.with_suffix(".yaml")
    if not info.exists():
        raise DataError(
            f"data.sources.path={path} is a folder without Energon's .nv-meta; "
            "make shards with tools/prepare_data.py, or run `energon prepare` on existing ones"
        )
    counts = yaml.safe_load(info.read_text())["shard_counts"]
    digest = hashlib.sha256(json.dumps(counts, sort_keys=True).encode()).hexdigest()[:16]
    return {"path": str(path.resolve()), "rows": sum(counts.values()), "fingerprint": digest, "shards": True}


def _slice_length(blend: list[dict], rows: int, consumers: int) -> int:
    if any(entry["shards"] for entry in blend):
        return SHARD_SLICE
    return max(1, -(-rows // (consumers * MAX_SLICES)))


def _write_blend(data, blend: list[dict], cache_folder: str | Path | None) -> str:
    """Energon's metadataset file; every source is seen `weight` times per epoch."""
    content = {
        "__module__": "megatron.energon",
        "__class__": "MetadatasetV2",
        "splits": {
            "train": {
                "blend_epochized": [
                    {
                        "path": entry["path"],
                        "repetitions": source.weight if source.weight % 1 else int(source.weight),
                        "subflavors": {"source": number},
                    }
                    for number, (source, entry) in enumerate(zip(data.sources, blend, strict=True))
                ]
            }
        },
    }
    text = yaml.safe_dump(content)
    folder = Path(cache_folder) if cache_folder else Path(data.sources[0].path).parent / ".moellava_index"
    path = folder / f"blend-{hashlib.sha256(text.encode()).hexdigest()[:16]}.yaml"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        work = path.with_suffix(f".{os.uname().nodename}.{os.getpid()}")
        work.write_text(text)
        work.rename(path)
    return str(path)
