"""Energon's loader state <-> JSON, so that a checkpoint holds no pickles.

Energon nests a few dataclasses, tuples, random generator states and long lists of row numbers. Its state is tagged here
and rebuilt only from the classes below; anything else is an error.
"""

import base64
import dataclasses
import zlib
from collections import Counter

import numpy as np
import torch

from megatron_moellava.config import DataError

from megatron.energon import rng, savable_loader, state
from megatron.energon.flavors.webdataset import sample_loader

_CLASSES = {
    cls.__name__: cls
    for cls in (
        savable_loader.SavableDataLoaderState,
        savable_loader.SavableDatasetCheckpoint,
        savable_loader.SavableDatasetState,
        rng.SystemRngState,
        sample_loader.SliceState,
    )
}
_LONG = 32  # integers from which a list is stored as compressed bytes


def to_json(value):
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if dataclasses.is_dataclass(value) and type(value).__name__ in _CLASSES:
        fields = {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"class": type(value).__name__, "fields": fields}
    if isinstance(value, torch.Tensor):
        return {"tensor": to_json(value.numpy())}
    if isinstance(value, np.ndarray):
        return {"array": _pack(value.tobytes()), "dtype": str(value.dtype), "shape": list(value.shape)}
    if isinstance(value, bytes):
        return {"bytes": _pack(value)}
    if isinstance(value, dict):
        kind = "flex" if isinstance(value, state.FlexState) else "dict"
        return {kind: [[to_json(key), to_json(item)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        if len(value) >= _LONG and all(type(item) is int and abs(item) < 2**62 for item in value):
            return {type(value).__name__: to_json(np.array(value, dtype=np.int64))}
        return {type(value).__name__: [to_json(item) for item in value]}
    if isinstance(value, np.generic):
        return value.item()
    raise DataError(f"loader state holds a {type(value).__name__}, which this version of Energon should not have")


def from_json(value):
    if not isinstance(value, dict):
        return value
    if "class" in value:
        if value["class"] not in _CLASSES:
            raise DataError(
                f"loader state names the unknown class {value['class']!r}; it is damaged or of a newer version"
            )
        return _CLASSES[value["class"]](**{name: from_json(item) for name, item in value["fields"].items()})
    if "tensor" in value:
        return torch.from_numpy(from_json(value["tensor"]))
    if "array" in value:
        return np.frombuffer(_unpack(value["array"]), dtype=value["dtype"]).reshape(value["shape"]).copy()
    if "bytes" in value:
        return _unpack(value["bytes"])
    (kind, items), *_ = value.items()
    if kind in ("flex", "dict"):
        pairs = {from_json(key): from_json(item) for key, item in items}
        return state.FlexState(pairs) if kind == "flex" else pairs
    items = from_json(items).tolist() if isinstance(items, dict) else [from_json(item) for item in items]
    return tuple(items) if kind == "tuple" else items


def _pack(data: bytes) -> str:
    return base64.b64encode(zlib.compress(data, 1)).decode()


def _unpack(text: str) -> bytes:
    return zlib.decompress(base64.b64decode(text))


def redistribute(saved: list[dict], world_size: int, num_workers: int | None = None) -> list[dict]:
    """States of all ranks -> states for another number of ranks and workers. Raises DataError where that is not exact.

    Energon's workers know their share by global number, so they may move between ranks if ranks x workers stays the
    same; the order in which a rank visits its workers must just be at its start, as it is every `num_workers` batches.
    The modality sampler (no `num_workers`) just needs a whole number of micro-batches per rank.
    """
    moved = _moved_position if num_workers is None else _moved_workers
    result = moved(saved, world_size, num_workers)
    counters = {"seen": 0, "skipped": {}, "notes": {}}
    for rank, state_ in enumerate(result):
        state_["fingerprint"] = (
            saved[0]["fingerprint"] | state_["fingerprint"] | {"rank": rank, "world_size": world_size}
        )
        state_["counters"] = counters if rank else _added_up([state["counters"] for state in saved])
    return result


def _moved_workers(saved: list[dict], world_size: int, num_workers: int) -> list[dict]:
    workers = [worker for state_ in saved for worker in state_["engine"]["fields"]["worker_states"]["list"]]
    if world_size * max(1, num_workers) != len(workers):
        raise DataError(
            f"the saved data order is that of {len(saved)} ranks x {len(workers) // len(saved)} workers; it can be "
            f"continued with any ranks x data.num_workers that gives {len(workers)}, not {world_size} x {num_workers}"
        )
    if any(state_["engine"]["fields"]["next_worker_id"] for state_ in saved):
        raise DataError(
            "the checkpoint was taken between two workers' turns; to continue with other ranks or workers, use one whose "
            "step is a multiple of data.num_workers micro-batches"
        )
    per_rank, first = len(workers) // world_size, saved[0]["engine"]
    shares = [{"worker_states": {"list": workers[rank * per_rank :][:per_rank]}} for rank in range(world_size)]
    engines = [first | {"fields": first["fields"] | share} for share in shares]
    return [{"fingerprint": {"num_workers": num_workers}, "engine": engine} for engine in engines]


def _moved_position(saved: list[dict], world_size: int, num_workers: None) -> list[dict]:
    engine = saved[0]["engine"]
    position, rest = divmod(engine["position"] * len(saved), world_size)
    if rest:
        raise DataError(
            f"the checkpoint was taken after {engine['position'] * len(saved)} micro-batches of the epoch, which "
            f"{world_size} ranks cannot have shared equally; use another checkpoint or number of ranks"
        )
    return [{"fingerprint": {}, "engine": engine | {"position": position}} for _ in range(world_size)]


def _added_up(counters: list[dict]) -> dict:
    total = {"seen": sum(found["seen"] for found in counters)}
    for kind in ("skipped", "notes"):
        total[kind] = dict(sum((Counter(found[kind]) for found in counters), Counter()))
    return total
