"""The loaders' states of all ranks -> those of another number of ranks."""

from collections import Counter

from megatron_moellava.config import DataError


def redistribute(saved: list[dict], world_size: int) -> list[dict]:
    """One state per new rank. The order of samples knows no ranks or workers, so every state is the same position.

    A rank whose micro-batch held no usable sample at all went on to its next one and is ahead of the others: then all
    continue from the position that every rank has reached, and a few samples come again: those of a step, where the ranks'
    shares of it are dealt by cost.
    Raises DataError for states of a damaged checkpoint.
    """
    try:
        epoch, position = min((state["engine"]["epoch"], state["engine"]["position"]) for state in saved)
        counters = [state["counters"] for state in saved]
        total = _added_up(counters)
    except (KeyError, TypeError) as error:
        raise DataError(f"the loader's state cannot be restored ({error!r}); the checkpoint is damaged") from error
    nothing = _added_up([])
    return [
        {
            "fingerprint": saved[0]["fingerprint"] | {"rank": rank, "world_size": world_size},
            "engine": {"epoch": epoch, "position": position},
            "counters": nothing if rank else total,
        }
        for rank in range(world_size)
    ]


def _added_up(counters: list[dict]) -> dict:
    total: dict = {key: sum(found[key] for found in counters) for key in ("seen", "trained")}
    for kind in ("skipped", "notes"):
        total[kind] = dict(sum((Counter(found[kind]) for found in counters), Counter()))
    epoch = max((found["bad_epoch"] for found in counters), default=0)
    bad = {number for found in counters if found["bad_epoch"] == epoch for number in found["bad"]}
    return total | {"bad_epoch": epoch, "bad": sorted(bad)}
