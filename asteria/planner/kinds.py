"""Parameters of one kind as one row: how they are treated and what their state takes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from asteria.planner.extents import Routed
from asteria.planner.weights import Weight
from asteria.runtime.records import Route

__all__ = ["Kind", "kinds"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """Parameters whose names differ by a number only, of one shape and dtype."""

    name: str
    """With ``*`` for the numbers."""
    count: int
    shape: tuple[int, ...]
    rule: str
    """``"soap"``, ``"kl-shampoo"``, ``"kl-soap"`` or ``"adamw"``."""
    treatment: str
    """For people: both-sided, one-sided or blocks, and of what size."""
    factors: tuple[tuple[int, int], ...]
    """(size, how many) of the Kronecker factors of one of them."""
    large_dims: tuple[int, ...]
    """Those without a factor."""
    state_bytes: int
    """Of all of them."""

    @property
    def parameters(self) -> int:
        """Elements of all of them."""
        elements = self.count
        for size in self.shape:
            elements *= size
        return elements


def kinds(ways: Routed) -> tuple[Kind, ...]:
    """One row for each kind, in the order of the first of each."""
    together: dict[tuple[str, int, object], list[tuple[Weight, Route]]] = {}
    for weight, way in ways:
        pattern = re.sub(r"\d+", "*", weight.name)
        together.setdefault((pattern, id(way), weight.dtype), []).append((weight, way))
    return tuple(_row(pattern, members) for (pattern, *_), members in together.items())


def _row(pattern: str, members: list[tuple[Weight, Route]]) -> Kind:
    weight, way = members[0]
    factors: dict[int, int] = {}
    large: set[int] = set()
    for _, shape, blocks in way.extents():
        for size, factored in zip(shape.dims, shape.factored, strict=True):
            if factored:
                factors[size] = factors.get(size, 0) + blocks
            else:
                large.add(size)
    return Kind(
        name=pattern if len(members) > 1 else weight.name,
        count=len(members),
        shape=tuple(weight.shape),
        rule=way.rule.name,
        treatment=_treatment(way, factors, sorted(large)),
        factors=tuple(sorted(factors.items())),
        large_dims=tuple(sorted(large)),
        state_bytes=len(members) * way.state_bytes(weight.dtype),
    )


def _treatment(way: Route, factors: dict[int, int], large: Iterable[int]) -> str:
    if not way.rule.has_bases:
        return "no factors"
    without = "".join(f", none of {size}" for size in large)
    shapes = [(shape, blocks) for _, shape, blocks in way.extents()]
    if sum(blocks for _, blocks in shapes) == 1:
        both = ", ".join(map(str, shapes[0][0].factor_sizes()))
        return ("one-sided: " if without else "") + f"factors of {both}{without}"
    sides = "factors of " + ", ".join(map(str, sorted(factors))) + without
    cut = " + ".join(f"{n} blocks {'x'.join(map(str, shape.dims))}" for shape, n in shapes)
    return cut + (without and f", one-sided: {sides}")
