"""From a parameter's shape to its rule and blocks. Pure functions."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from asteria.algorithms.adam import AdamW
from asteria.algorithms.algorithm import Algorithm, BlockShape
from asteria.errors import ConfigError
from asteria.linalg.partition import cut, merge
from asteria.runtime.extents import CHUNK_BYTES
from asteria.runtime.records import Route, TilePlan

__all__ = ["check_route", "route", "routing_options"]

_ADAMW = AdamW()
_OPTIONS = (
    "max_precond_dim",
    "large_dims",
    "merge_dims",
    "precondition_1d",
    "data_format",
    "batch_dims",
)
_ELEMENT_BYTES = 8
"""Of the widest state there is, so that tiles do not depend on the dtype."""
_STACK_DIM = 32
"""A rank-3 parameter is a stack of matrices if its last two dims are at least this."""


def routing_options(group: Mapping[str, Any]) -> tuple[object, ...]:
    """The options of a group that decide on the blocks of its parameters."""
    return tuple(group.get(option) for option in _OPTIONS)


def check_route(name: str, before: tuple[object, ...], now: tuple[object, ...]) -> None:
    """Raise ConfigError if `routing_options` have changed since the parameter's state was made."""
    for option, made_for, found in zip(_OPTIONS, before, now, strict=True):
        if made_for != found:
            raise ConfigError(
                f"{name}: its state was made for {option}={made_for!r}, now its group says "
                f"{found!r}; nothing was changed. Set it back, or start the parameter afresh with "
                "`del optimizer.state[parameter]`"
            )


def route(shape: torch.Size, group: Mapping[str, Any], rule: Algorithm, name: str) -> Route:
    """The rule and blocks of a parameter of this shape under its group's options.

    - Leading batch dims (``group["batch_dims"]``; by default one for a rank-3 parameter whose last
      two dims are at least 32, as stacks of experts have, none else) index independent blocks.
    - With ``large_dims="blocks"`` every dim above ``max_precond_dim`` is cut into tiles; with
      ``"one_sided"`` it has no factor.
    - With ``merge_dims`` neighbouring dims are merged while their product stays below the limit.
    - Dims of size 1 have no factor. What is left without any, and vectors (unless
      ``precondition_1d``), take the AdamW rule.

    Raises ConfigError if there are fewer dims than batch dims.
    """
    batch = _batch_dims(shape, group, name)
    limit = group["max_precond_dim"]
    core = shape[batch:]
    vector = len(core) < 2 and not (group.get("precondition_1d", False) and len(core) == 1)
    if math.prod(shape) == 0 or vector:
        return _adamw(shape, group)
    cuts = [[slice(0, size)] for size in core]
    if group["large_dims"] == "blocks":
        cuts = [cut(size, limit) for size in core]
    tiles: list[TilePlan] = []
    for core_slices in itertools.product(*cuts):
        dims = [s.stop - s.start for s in core_slices]
        permutation = _permutation(len(dims), batch, group)
        block = _block_shape(dims, permutation, limit, group)
        if rule.squeezes and len(block.dims) < 2:
            return _adamw(shape, group)
        for rows in _rows(shape[:batch], math.prod(block.dims)):
            slices = (*rows, *core_slices)
            blocks = math.prod(s.stop - s.start for s in slices[:batch])
            tiles.append(TilePlan(block, blocks, slices, permutation, ordinal=len(tiles)))
    if not any(any(tile.shape.factored) for tile in tiles):
        return _adamw(shape, group)
    in_order = math.prod(map(len, cuts)) == 1 and tiles[0].permutation is None
    if len(tiles) == 1:
        tiles = [dataclasses.replace(tiles[0], slices=())]
    return Route(rule, tuple(tiles), keeps_layout=in_order)


def _adamw(shape: torch.Size, group: Mapping[str, Any]) -> Route:
    """One element is one block; cut along the first dim where the parameter exceeds a chunk."""
    element = BlockShape((), ())
    # The root mean square of an update is taken over the parameter, so that one stays whole.
    if math.prod(shape) * _ELEMENT_BYTES <= CHUNK_BYTES or group["normalize_grads"]:
        return Route(_ADAMW, (TilePlan(element, math.prod(shape)),), keeps_layout=True)
    row = math.prod(shape[1:])
    tiles = tuple(
        TilePlan(element, (rows.stop - rows.start) * row, (rows,), ordinal=ordinal)
        for ordinal, (rows,) in enumerate(_rows(shape[:1], row))
    )
    return Route(_ADAMW, tiles, keeps_layout=True)


def _batch_dims(shape: torch.Size, group: Mapping[str, Any], name: str) -> int:
    asked = group.get("batch_dims")
    if asked is None:
        return 1 if len(shape) == 3 and min(shape[1:]) >= _STACK_DIM else 0
    if asked and asked >= len(shape):
        raise ConfigError(
            f"{name}: batch_dims={asked} was asked for, found shape {tuple(shape)}: at least one "
            "dim must be left; put this parameter into a group with fewer batch_dims"
        )
    return int(asked)


def _permutation(rank: int, batch: int, group: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Channels first, when dims are merged of a convolution that is stored channels last."""
    channels_last = group.get("merge_dims", False) and group["data_format"] == "channels_last"
    if not channels_last or rank != 4:
        return None
    return (*range(batch), batch, batch + 3, batch + 1, batch + 2)


def _block_shape(
    dims: list[int], permutation: tuple[int, ...] | None, limit: int, group: Mapping[str, Any]
) -> BlockShape:
    if permutation is not None:
        dims = [dims[0], dims[3], dims[1], dims[2]]
    merged = merge(dims, limit) if group.get("merge_dims", False) else tuple(dims)
    kept = tuple(size for size in merged if size > 1)
    return BlockShape(kept, tuple(size <= limit for size in kept))


def _rows(batch_shape: torch.Size, block_elements: int) -> Iterator[tuple[slice, ...]]:
    """Slices of the batch dims, cut along the first so that no tile is larger than a chunk."""
    if not batch_shape:
        yield ()
        return
    rows = max(1, CHUNK_BYTES // (_ELEMENT_BYTES * math.prod(batch_shape[1:]) * block_elements))
    rest = [slice(0, size) for size in batch_shape[1:]]
    for start in range(0, batch_shape[0], rows):
        yield (slice(start, min(start + rows, batch_shape[0])), *rest)
