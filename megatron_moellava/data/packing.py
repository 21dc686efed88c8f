"""Which samples share a row.

A row takes the oldest waiting sample and the subset of the others that fills it best. Only some rows are made at a time,
from many candidates; what is left waits for the next samples, and the last rows of an epoch take what there is: no
sample is left out.

Data-parallel ranks wait for each other, so their rows of one step should cost the same: rows that follow each other are
sorted by cost (attention; at native resolution the tower's work with their pictures, too), and ranks take them in turn.
"""

from collections.abc import Sequence

ROUND_SHARE = 8  # a round makes at most packing_buffer / ROUND_SHARE rows
RESERVE = 2  # rows' worth of tokens that must wait beside a row, so that there is something to choose from
SORTED = 128  # rows that are sorted by cost among themselves


def pack_epoch(
    samples: Sequence[int],
    lengths: Sequence[int],
    capacity: int,
    buffer: int,
    costs: Sequence[float] | None = None,
) -> list[list[int]]:
    """Rows of sample numbers. `lengths[i]`: tokens of samples[i], at most `capacity`; 0: unusable, in any row.

    `costs[i]`: what samples[i] costs a rank; None: its attention, the square of its length.

    >>> pack_epoch([7, 8, 9], [5, 3, 6], 8, buffer=4)
    [[7, 8], [9]]
    """
    costs = [length**2 for length in lengths] if costs is None else costs
    rows: list[tuple[float, list[int]]] = []  # (cost, samples)
    waiting: list[int] = []
    unusable: list[int] = []  # to be met, and counted, in their turn
    arriving = iter(range(len(samples)))
    while True:
        while len(waiting) < buffer and (index := next(arriving, None)) is not None:
            (waiting if lengths[index] else unusable).append(index)
        if not waiting:
            break
        chosen, rest = select_rows([lengths[index] for index in waiting], capacity)
        made = [[waiting[place] for place in row] for row in chosen]
        made[-1] += unusable
        unusable = []
        rows += [(sum(costs[index] for index in row), [samples[index] for index in row]) for row in made]
        waiting = [waiting[place] for place in rest]
    groups = (rows[start : start + SORTED] for start in range(0, len(rows), SORTED))
    packed = [row for group in groups for _, row in sorted(group, key=lambda row: row[0])]
    return packed + [[samples[index] for index in unusable]] * bool(unusable)


def select_rows(lengths: list[int], capacity: int) -> tuple[list[list[int]], list[int]]:
    """(rows, left over) as indices. Each row holds the oldest sample and the subset that fills it best.

    At least one row is made, so that no sample waits for ever.

    >>> select_rows([5, 3, 4, 2], 8)
    ([[0, 1]], [2, 3])
    """
    waiting = list(range(len(lengths)))
    rows: list[list[int]] = []
    most = max(1, len(lengths) // ROUND_SHARE)
    while waiting and len(rows) < most:
        if rows and sum(lengths[i] for i in waiting) < RESERVE * capacity:
            break
        oldest, *others = waiting
        chosen = fullest_subset([lengths[i] for i in others], capacity - lengths[oldest])
        rows.append([oldest, *(others[i] for i in chosen)])
        taken = set(rows[-1])
        waiting = [i for i in waiting if i not in taken]
    return sorted(rows, key=lambda row: sum(lengths[i] ** 2 for i in row)), waiting


def fullest_subset(lengths: list[int], space: int) -> list[int]:
    """Indices whose lengths sum up closest to `space` from below; early indices are preferred.

    Subset sum on bit sets: bit s of reach[i] says that the first i lengths can sum up to s.
    """
    mask = (1 << (space + 1)) - 1
    reach = [1]
    for length in lengths:
        reach.append((reach[-1] | reach[-1] << length) & mask)
        if reach[-1] >> space:  # exactly full
            break
    total, chosen = reach[-1].bit_length() - 1, []
    for index in range(len(reach) - 2, -1, -1):
        if not reach[index] >> total & 1:
            chosen.append(index)
            total -= lengths[index]
    return chosen[::-1]
