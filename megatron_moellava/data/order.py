"""Which sample comes when: the same for every number of ranks and workers, and every sample of an epoch once.

Samples have numbers: those of the first source, then those of the next. An epoch is a list of items (samples, packed
rows, or the modality sampler's micro-batches), and the run is one endless stream of items, epoch after epoch.
Micro-batch m of it goes to data-parallel rank m % world_size; where costs are known, those of a step are dealt by them
(`dealing.py`). So a position in the stream is all there is to resume.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from megatron_moellava.data.dealing import deal

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


@dataclass(frozen=True, slots=True)
class Position:
    """Where a rank's stream goes on."""

    epoch: int
    items: int  # of the epoch, that all ranks together have taken; where micro-batches are dealt, by whole steps
    rounds: int = 0  # micro-batches that this rank has taken of the step that begins there


class Stream:
    """The endless stream of one rank's micro-batches. `plan(epoch)` gives the items of an epoch."""

    def __init__(
        self,
        plan: Callable[[int], Items],
        *,
        group: int,
        rank: int,
        world_size: int,
        cost: Callable[[Items], float] | None = None,
        rounds: int = 1,
    ):
        """`group`: items of a micro-batch. `cost`: of one; then the micro-batches of a step, `rounds` for each rank, are dealt
        by it."""
        self.plan = functools.lru_cache(maxsize=2)(plan)  # the end of one epoch and the start of the next
        self.group, self.rank, self.world_size = group, rank, world_size
        self.cost, self.rounds = cost, rounds if cost else 1

    def from_(self, position: Position) -> Iterator[tuple[int, list[int], Position]]:
        """(epoch of its first item, samples, position after it and those that the other ranks take meanwhile) of each
        micro-batch."""
        while True:
            step, taken = (position.epoch, position.items), position.rounds
            following = Position(*self._after(step, self.rounds * self.world_size))
            for number, place in list(enumerate(self._own(step), start=1))[taken:]:
                first, *_ = self._after(step, place)
                samples = [sample for item in self._items(step, place) for sample in item]
                yield first, samples, following if number == self.rounds else Position(*step, number)
            position = following

    def _own(self, step: tuple[int, int]) -> list[int]:
        """Which micro-batches of a step are this rank's."""
        if self.cost is None:
            return [self.rank]
        costs = [self.cost(self._items(step, place)) for place in range(self.rounds * self.world_size)]
        return deal(costs, self.world_size)[self.rank]

    def _items(self, step: tuple[int, int], place: int) -> Items:
        """Those of the micro-batch that is number `place` of a step."""
        epoch, item = self._after(step, place)
        found = (self._normal(epoch, item + offset) for offset in range(self.group))
        return [self.plan(number)[where] for number, where in found]

    def _after(self, step: tuple[int, int], micro_batches: int) -> tuple[int, int]:
        epoch, item = step
        return self._normal(epoch, item + micro_batches * self.group)

    def _normal(self, epoch: int, item: int) -> tuple[int, int]:
        while item >= len(self.plan(epoch)):
            item -= len(self.plan(epoch))
            epoch += 1
        return epoch, item
