"""Which data-parallel rank computes which micro-batch of a step, where micro-batches differ in what they cost.

Ranks wait for each other at the end of a step, and with expert parallelism in every layer: so the micro-batches that they
compute at one time should be alike, and what each has computed in the end. What a step holds is not changed.
"""

from collections.abc import Sequence


def deal(costs: Sequence[float], world_size: int) -> list[list[int]]:
    """For each rank the micro-batches that it computes, equally many, in their order. `costs`: of all of a step.

    The longest come first: the `world_size` longest are a round, of which each rank gets one, then the next. Of each round
    the longest goes to the rank that has least so far. Rounds are computed in the order of their first micro-batches, so one
    rank alone computes all as they come.

    >>> deal([1, 9, 4, 6], 2)
    [[0, 1], [2, 3]]
    """
    longest = sorted(range(len(costs)), key=lambda number: -costs[number])
    loads = [0.0] * world_size
    rounds = []
    for start in range(0, len(longest), world_size):
        free = sorted(range(world_size), key=lambda rank: loads[rank])
        dealt = dict(zip(free, longest[start : start + world_size], strict=True))
        for rank, number in dealt.items():
            loads[rank] += costs[number]
        rounds.append([dealt[rank] for rank in range(world_size)])
    return [list(numbers) for numbers in zip(*sorted(rounds, key=min), strict=True)]
