"""Refreshes in flight as flat state tensors: the keys of a checkpoint that they take.

``shadow_{tile}_{position}_version``, ``..._lands`` () and ``..._basis_{mode}`` (b, n, n), the
positions of a tile counting from its oldest refresh.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from asteria.refresh.pipeline import Flight
from asteria.runtime.records import Route

__all__ = ["is_shadow", "pack", "shadow_shapes", "unpack"]

_KEY = re.compile(r"shadow_(\d+)_(\d+)_(version|lands|basis_(\d+))")


def is_shadow(key: str) -> bool:
    """Whether a state's key belongs to a refresh in flight."""
    return _KEY.fullmatch(key) is not None


def pack(
    tile: int, position: int, flight: Flight[Any], bases: Iterable[Tensor | None]
) -> dict[str, Tensor]:
    """One refresh as state tensors; the bases are not copied."""
    prefix = f"shadow_{tile}_{position}_"
    entries = {
        prefix + name: torch.tensor(float(step), dtype=torch.float32, device="cpu")
        for name, step in (("version", flight.version), ("lands", flight.lands))
    }
    for mode, basis in enumerate(bases):
        if basis is not None:
            entries[f"{prefix}basis_{mode}"] = basis
    return entries


def unpack(
    route: Route, saved: Mapping[str, Tensor], dtype: torch.dtype
) -> Iterator[tuple[int, tuple[int, int], list[Tensor | None]]]:
    """(tile, (version, lands), basis of every mode) of each refresh, oldest first for each tile.

    The bases are host copies in ``dtype``, column after column in memory.
    """
    places = {(int(m[1]), int(m[2])) for key in saved if (m := _KEY.fullmatch(key))}
    for tile, position in sorted(places):
        prefix = f"shadow_{tile}_{position}_"
        bases: list[Tensor | None] = []
        for mode in range(len(route.tiles[tile].shape.dims)):
            basis = saved.get(f"{prefix}basis_{mode}")
            if basis is None:
                bases.append(None)
            else:
                columns = torch.empty(basis.mT.shape, dtype=dtype, device="cpu")
                bases.append(columns.copy_(basis.mT).mT)
        yield tile, (int(saved[f"{prefix}version"]), int(saved[f"{prefix}lands"])), bases


def shadow_shapes(route: Route, keys: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Key and shape of all that must be there, given that some of it is among ``keys``."""
    shapes: dict[str, tuple[int, ...]] = {}
    for key in keys:
        match = _KEY.fullmatch(key)
        if match is None or int(match[1]) >= len(route.tiles) or not route.rule.has_bases:
            continue
        plan = route.tiles[int(match[1])]
        prefix = f"shadow_{match[1]}_{match[2]}_"
        shapes[f"{prefix}version"] = shapes[f"{prefix}lands"] = ()
        for mode, (size, factored) in enumerate(
            zip(plan.shape.dims, plan.shape.factored, strict=True)
        ):
            if factored:
                shapes[f"{prefix}basis_{mode}"] = (plan.blocks, size, size)
    return shapes
