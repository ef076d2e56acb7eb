"""The extents that parameters will be cut into, without the parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import torch

from asteria.algorithms.algorithm import Algorithm
from asteria.planner.weights import Weight
from asteria.runtime.extents import ExtentKey, cut_blocks
from asteria.runtime.records import Route
from asteria.runtime.routing import route

__all__ = ["Census", "Routed", "planned_extents", "routed"]

Routed: TypeAlias = list[tuple[Weight, Route]]
"""Every parameter with its way, in order."""

Census: TypeAlias = list[tuple[ExtentKey, int]]
"""(kind, blocks) of every extent, in the order in which the runtime makes them."""


def routed(weights: Iterable[Weight], group: Mapping[str, Any], rule: Algorithm) -> Routed:
    """Route every parameter as the optimizer does; equal shapes share a route.

    Raises ConfigError as `asteria.runtime.routing.route`.
    """
    ways: dict[torch.Size, Route] = {}
    found = []
    for weight in weights:
        if weight.shape not in ways:
            ways[weight.shape] = route(weight.shape, group, rule, weight.name)
        found.append((weight, ways[weight.shape]))
    return found


def planned_extents(ways: Routed, device: torch.device) -> Census:
    """Cut tiles into extents as the runtime does when all parameters get state at once."""
    arrivals: dict[ExtentKey, list[tuple[int, int]]] = {}
    parts: dict[tuple[int, torch.dtype], list[tuple[ExtentKey, list[tuple[int, int]]]]] = {}
    for weight, way in ways:
        by_route = parts.get((id(way), weight.dtype))
        if by_route is None:
            kinds: dict[ExtentKey, list[tuple[int, int]]] = {}
            for tile in way.tiles:
                key = ExtentKey(way.rule, tile.shape, weight.dtype, device)
                kinds.setdefault(key, []).append((tile.blocks, tile.blocks))
            by_route = parts[id(way), weight.dtype] = list(kinds.items())
        for key, tiles in by_route:
            arrivals.setdefault(key, []).extend(tiles)
    return [
        (key, sum(group))
        for key, tiles in arrivals.items()
        for group in cut_blocks(tiles, key.most_blocks)
    ]
