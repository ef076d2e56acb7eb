"""How a tensor's shape is merged and cut before it gets Kronecker factors. Pure functions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

__all__ = ["cut", "merge"]


def merge(shape: Sequence[int], limit: int) -> tuple[int, ...]:
    """Merge neighbouring dims, from the first on, while their product is at most ``limit``.

    A dim above the limit stays by itself. The published rule: (12, 3, 2, 2) with limit 12 becomes
    (12, 12), and a tensor of at most ``limit`` elements becomes a vector.
    """
    merged: list[int] = []
    current = 1
    for size in shape:
        if current * size <= limit:
            current *= size
        elif current > 1:
            merged.append(current)
            current = size
        else:
            merged.append(size)
            current = 1
    if current > 1 or not merged:
        merged.append(current)
    return tuple(merged)


def cut(size: int, limit: int) -> list[slice]:
    """Cut a dim into the fewest nearly equal parts of at most ``limit``, larger ones first."""
    parts = max(1, math.ceil(size / limit))
    small, larger = divmod(size, parts)
    edges = list(itertools.accumulate([small + (part < larger) for part in range(parts)]))
    return [slice(start, stop) for start, stop in zip([0, *edges], edges, strict=False)]
