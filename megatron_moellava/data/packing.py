"""Which samples share a row, and an Energon packing stage that carries what does not fit into the next round.

Energon packs its whole buffer each round, so the last rows of a round are filled badly: with 64 short samples that
wastes 6 % of all positions. Here only some rows are made per round, from many candidates; the other samples go back into
the (savable) buffer and meet the next ones.

Data-parallel ranks wait for each other, so their rows of one step should cost the same. Every rank makes the same number
of rows per round and sorts them by attention cost; as all ranks draw from one distribution, rows of equal rank are alike.
"""

from megatron.energon.wrappers.packing_dataset import PackingDataset

ROUND_SHARE = 8  # a round makes at most packing_buffer / ROUND_SHARE rows
RESERVE = 2  # rows' worth of tokens that must wait beside a row, so that there is something to choose from


def select_rows(lengths: list[int], capacity: int) -> tuple[list[list[int]], list[int]]:
    """(rows, left over) as indices. Each row holds the oldest sample and the subset that fills it best.

    At least one row is made, so that no sample waits for ever.

    >>> select_rows([5, 3, 4, 2], 8)
    ([[0, 1]], [2, 3])
    """
    waiting, rows = list(range(len(lengths))), []
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


class CarryOverPacking(PackingDataset):
    """PackingDataset whose pre-packer returns (packs, left over); what is left goes back into the reading buffer."""

    def __init__(self, *args, pre_packer, **kwargs):
        def keep_rest(samples):
            packs, rest = pre_packer(samples)  # Energon has just emptied the reading buffer
            self._reading_buffer.extend(rest)
            return packs

        super().__init__(*args, pre_packer=keep_rest, **kwargs)

    def _fill_reading_buffer(self, source_iter, log_progress=False) -> bool:
        return super()._fill_reading_buffer(source_iter, log_progress=False)
