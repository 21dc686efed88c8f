"""Which expert-parallel rank should hold which expert, so that no rank has much more to do than the others.

A rank holds E / R neighbours, so that experts change ranks by changing numbers. An order says for each number (place) which
expert of today it gets. Experts that the routers tell apart by their number (groups by modality, groups of which only some are
chosen from) stay among their own.
"""

from collections.abc import Sequence

from megatron_moellava.config import MoEConfig
from megatron_moellava.routers import experts_by_group


def kinds_of_places(moe: MoEConfig) -> list[tuple]:
    """Of each place what its expert must be: places of the same kind may exchange their experts."""
    owners = experts_by_group(moe.expert_groups) if moe.expert_groups else ("",) * moe.num_moe_experts
    size = moe.num_moe_experts // (moe.moe_router_num_groups or 1)
    return [(owner, place // size) for place, owner in enumerate(owners)]


def load_of_ranks(loads_E: Sequence[float], ranks: int) -> list[float]:
    """Sums over the neighbours that each rank holds."""
    size = len(loads_E) // ranks
    return [sum(loads_E[rank * size : (rank + 1) * size]) for rank in range(ranks)]


def busiest_over_mean(loads_E: Sequence[float], ranks: int) -> float:
    """1.0 is level, `ranks` the worst; 1.0 where there is no load.

    >>> busiest_over_mean([6, 2, 1, 3], 2)
    1.3333333333333333
    """
    loads_R = load_of_ranks(loads_E, ranks)
    return max(loads_R) * ranks / sum(loads_R) if sum(loads_R) else 1.0


def level_order(loads_E: Sequence[float], ranks: int, kinds: Sequence[tuple]) -> list[int]:
    """An order under which the busiest rank has little more than the mean: the heaviest experts first, each to the rank
    that has least so far and a place of its kind; then exchanges of two for as long as they help the busier rank of the two.

    Today's order where this is no better. Experts that stay on their rank keep their places, so far as they can.

    >>> level_order([6, 2, 1, 3], 2, [()] * 4)
    [0, 2, 1, 3]
    """
    size, today = len(loads_E) // ranks, list(range(len(loads_E)))
    free = [[place for place in today if place // size == rank] for rank in range(ranks)]
    order, filled = [-1] * len(today), [0.0] * ranks
    for expert in sorted(today, key=lambda expert: -loads_E[expert]):
        fitting = [rank for rank in range(ranks) if any(kinds[place] == kinds[expert] for place in free[rank])]
        rank = min(fitting, key=lambda rank: (filled[rank], rank != expert // size))
        own = [place for place in free[rank] if kinds[place] == kinds[expert]]
        place = expert if expert in own else own[-1]
        order[place] = expert
        free[rank].remove(place)
        filled[rank] += loads_E[expert]
    _exchange(order, loads_E, filled, kinds)
    better = max(filled) < max(load_of_ranks(loads_E, ranks))
    return _settled(order, size, kinds) if better else today


def _exchange(order: list[int], loads_E: Sequence[float], filled: list[float], kinds: Sequence[tuple]) -> None:
    """Swap experts of two ranks while that lowers the larger of their two loads."""
    size, changed = len(order) // len(filled), True
    while changed:
        changed = False
        for one in range(len(order)):
            for two in range(one + 1, len(order)):
                here, there = one // size, two // size
                more = loads_E[order[one]] - loads_E[order[two]]
                after = max(filled[here] - more, filled[there] + more)
                if here != there and kinds[one] == kinds[two] and after < max(filled[here], filled[there]) * (1 - 1e-9):
                    order[one], order[two] = order[two], order[one]
                    filled[here], filled[there] = filled[here] - more, filled[there] + more
                    changed = True


def _settled(order: list[int], size: int, kinds: Sequence[tuple]) -> list[int]:
    """The same experts on each rank, but those that were there before keep their places."""
    settled = [-1] * len(order)
    for place, expert in enumerate(order):
        if place // size == expert // size:
            settled[expert] = expert
    for place, expert in enumerate(order):
        if place // size != expert // size:
            own = range(place // size * size, (place // size + 1) * size)
            settled[next(p for p in own if settled[p] < 0 and kinds[p] == kinds[expert])] = expert
    return settled
