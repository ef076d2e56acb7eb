"""Which rank owns which factors. Pure functions of costs and sizes.

The owner alone keeps a factor, accumulates it and refreshes its bases. What is owned as a whole is
a load: it has a cost, paid when it is refreshed, and bytes, which are always there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

__all__ = ["Load", "assign", "least_makespan", "totals"]

_MOST_SPLITS = 64
"""Of a rank's capacity, in the search for a bound."""
_ROUNDING = 1e-9


class Load(NamedTuple):
    """What is owned as a whole."""

    cost: float
    """Of a refresh, in any unit."""
    nbytes: float
    """Of its factors."""


def assign(loads: Sequence[Load], ranks: int, carried: Sequence[Load] = ()) -> list[int]:
    """The rank (from 0) of each load.

    The largest first, each to the rank whose share of all work or of all bytes, whichever is
    larger, stays smallest; equals in the order given, to the lowest rank. ``carried`` is what
    ranks own already, by rank. The same arguments give the same owners, everywhere and always.
    """
    taken = np.zeros((2, ranks))
    if carried:
        taken += np.array(carried, dtype=np.float64).T
    sizes = np.array(loads, dtype=np.float64).reshape(-1, 2).T
    whole = np.maximum(sizes.sum(1) + taken.sum(1), 1e-300)
    taken /= whole[:, None]
    shares = sizes / whole[:, None]
    owners = [0] * len(loads)
    for place in sorted(range(len(loads)), key=lambda place: (-loads[place].cost, place)):
        rank = int(np.argmin((taken + shares[:, place, None]).max(0)))
        taken[:, rank] += shares[:, place]
        owners[place] = rank
    return owners


def totals(loads: Iterable[Load], owners: Iterable[int], ranks: int) -> list[Load]:
    """What each rank owns in all."""
    found = [Load(0.0, 0.0)] * ranks
    for load, owner in zip(loads, owners, strict=True):
        cost, nbytes = found[owner]
        found[owner] = Load(cost + load.cost, nbytes + load.nbytes)
    return found


def least_makespan(costs: Sequence[float], ranks: int) -> float:
    """No assignment of undivided costs can have a smaller largest sum.

    At least max(total / ranks, largest), which is far below what is possible where there are few
    loads for each rank: 81 equal ones do not fit on 32 ranks in twos. So the bound counts with
    dual feasible functions: if only k loads of a kind fit below a capacity, each takes 1/k of it.

    Source: Fekete and Schepers 2001, New classes of fast lower bounds for bin packing problems.
    """
    sizes = np.sort(np.asarray(costs, dtype=np.float64))[::-1]
    if not len(sizes):
        return 0.0
    low = max(float(sizes.sum()) / ranks, float(sizes[0]))
    high = 2 * low  # which is always enough
    while high - low > _ROUNDING * high:
        middle = (low + high) / 2
        if _overflows(sizes / middle, ranks):
            low = middle
        else:
            high = middle
    return low


def _overflows(shares: np.ndarray[tuple[int], np.dtype[np.float64]], ranks: int) -> bool:
    """Whether these shares of a rank's capacity certainly do not fit on so many ranks."""
    for splits in range(1, _MOST_SPLITS):
        places = (splits + 1) * shares
        whole = np.abs(places - np.rint(places)) < _ROUNDING
        counted = np.where(whole, shares, np.floor(places + _ROUNDING) / splits)
        if counted.sum() > ranks * (1 + _ROUNDING):
            return True
    return False
