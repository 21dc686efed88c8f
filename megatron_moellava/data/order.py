"""Which sample comes when: the same for every number of ranks and workers, and every sample of an epoch once.

Samples have numbers: those of the first source, then those of the next. An epoch is a list of items (samples, packed
rows, or the modality sampler's micro-batches), and the run is one endless stream of items, epoch after epoch.
Micro-batch m of it goes to data-parallel rank m % world_size. So a position in the stream is all there is to resume.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

ORDER = 2  # version; raise it when the same seed gives another order
SHARD_RUN = 32  # samples read in sequence from a tar

Items = list[list[int]]


@dataclass(frozen=True, slots=True)
class Share:
    """What an epoch takes from a source."""

    rows: int
    weight: float = 1.0  # times that each row is seen per epoch; of 0.5, each epoch shows the other half
    run: int = 1  # rows that stay together


def sample_order(shares: list[Share], seed: int, epoch: int) -> list[int]:
    """Sample numbers of one epoch.

    A source is an endless row of permutations, of which every epoch takes the next rows * weight samples: so a row
    comes again only when all others have come. Sources are mixed evenly: each stretch of the epoch has its part of all.
    """
    numbers, places, start = [], [], 0
    for source, share in enumerate(shares):
        taken = _taken(share, seed, source, epoch)
        shift = np.random.RandomState(_seed(seed, source, epoch, 1)).random_sample(len(taken))
        numbers.append(start + taken)
        places.append((np.arange(len(taken)) + shift) / max(len(taken), 1))
        start += share.rows
    return np.concatenate(numbers)[np.argsort(np.concatenate(places), kind="stable")].tolist()


def _taken(share: Share, seed: int, source: int, epoch: int) -> np.ndarray:
    first, last = (int(share.rows * share.weight * number) for number in (epoch, epoch + 1))
    rounds = range(first // share.rows, -(-last // share.rows))
    drawn = [_permutation(share, _seed(seed, source, number, 0)) for number in rounds]
    begin = first - rounds.start * share.rows
    return np.concatenate([*drawn, np.empty(0, dtype=np.int64)])[begin : begin + last - first].astype(np.int64)


def _permutation(share: Share, seed: list[int]) -> np.ndarray:
    generator = np.random.RandomState(seed)  # its stream is frozen in all versions of numpy
    if share.run == 1:
        return generator.permutation(share.rows)
    starts = generator.permutation(-(-share.rows // share.run)) * share.run
    return np.concatenate([np.arange(start, min(start + share.run, share.rows)) for start in starts])


def _seed(*parts: int) -> list[int]:
    return [part % 2**32 for part in parts]


class Stream:
    """The endless stream of one rank's micro-batches. `plan(epoch)` gives the items of an epoch."""

    def __init__(self, plan: Callable[[int], Items], *, group: int, rank: int, world_size: int):
        self.plan = functools.lru_cache(maxsize=2)(plan)  # the end of one epoch and the start of the next
        self.group, self.rank, self.world_size = group, rank, world_size

    def from_(self, epoch: int, position: int) -> Iterator[tuple[int, list[int], int, int]]:
        """(epoch of its first item, samples, epoch and position after the round of all ranks) of each micro-batch.

        `position`: items of the epoch that all ranks together have taken.
        """
        while True:
            first = self._normal(epoch, position + self.rank * self.group)
            samples = [sample for offset in range(self.group) for sample in self._item(first[0], first[1] + offset)]
            epoch, position = self._normal(epoch, position + self.world_size * self.group)
            yield first[0], samples, epoch, position

    def _item(self, epoch: int, position: int) -> list[int]:
        epoch, position = self._normal(epoch, position)
        return self.plan(epoch)[position]

    def _normal(self, epoch: int, position: int) -> tuple[int, int]:
        while position >= len(self.plan(epoch)):
            position -= len(self.plan(epoch))
            epoch += 1
        return epoch, position
