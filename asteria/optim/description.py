"""The routing of an optimizer as a table."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from asteria.runtime.records import Route, state_dtype
from asteria.runtime.sharding import Sharding

__all__ = ["Description", "ParameterDescription", "describe_parameter"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterDescription:
    """One row: how a parameter is treated."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    rule: str
    """``"soap"``, ``"kl-shampoo"``, ``"kl-soap"`` or ``"adamw"``."""
    blocks: tuple[tuple[int, tuple[int, ...]], ...]
    """(number of blocks, their dims) for each block shape; empty under the AdamW rule."""
    factors: tuple[tuple[int, ...], ...]
    """For each block shape the sizes of its Kronecker factors."""
    state_bytes: int
    """Of all state tensors, step counter aside."""
    shards: str = ""
    """Of a sharded parameter: how it is stepped, ``"exact"`` or ``"local"``. Blocks, factors and
    bytes are then those of the whole, or of this rank's shard.
    """
    owner: int | None = None
    """Rank that has the state and steps the whole, if exact; known from the first step on."""


def describe_parameter(
    name: str, parameter: Tensor, way: Route, sharding: Sharding | None
) -> ParameterDescription:
    """The row of a parameter that goes this way."""
    shapes = [(shape, blocks) for _, shape, blocks in way.extents() if shape.dims]
    return ParameterDescription(
        name=name,
        shape=tuple(parameter.shape),
        dtype=str(parameter.dtype).removeprefix("torch."),
        rule=way.rule.name,
        blocks=tuple((blocks, shape.dims) for shape, blocks in shapes),
        factors=tuple(shape.factor_sizes() for shape, _ in shapes),
        state_bytes=way.state_bytes(state_dtype(parameter)),
        shards="" if sharding is None else "exact" if sharding.exact else "local",
        owner=None if sharding is None else sharding.owning_rank,
    )


@dataclass(frozen=True, slots=True)
class Description:
    """The routing of all parameters; ``str()`` makes a table of it."""

    rows: tuple[ParameterDescription, ...]

    @property
    def state_bytes(self) -> int:
        """Bytes of state of all parameters."""
        return sum(row.state_bytes for row in self.rows)

    def __str__(self) -> str:
        head: tuple[str, ...]
        head = ("parameter", "shape", "dtype", "rule", "blocks", "factors", "state")
        table = [head, *map(_cells, self.rows)]
        table.append(("total", "", "", "", "", "", _readable(self.state_bytes)))
        if any(row.shards for row in self.rows):
            cells = [("shards", "owner"), *map(_shard_cells, self.rows), ("", "")]
            table = [(*line, *more) for line, more in zip(table, cells, strict=True)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in table
        )


def _cells(row: ParameterDescription) -> tuple[str, ...]:
    blocks = " + ".join(f"{count} x {_dims(dims)}" for count, dims in row.blocks)
    factors = " + ".join(", ".join(map(str, sizes)) for sizes in row.factors)
    return (
        row.name,
        _dims(row.shape) or "scalar",
        row.dtype,
        row.rule,
        blocks or "-",
        factors or "-",
        _readable(row.state_bytes),
    )


def _shard_cells(row: ParameterDescription) -> tuple[str, str]:
    return row.shards or "-", "-" if row.owner is None else f"rank {row.owner}"


def _dims(dims: tuple[int, ...]) -> str:
    return "x".join(map(str, dims))


def _readable(size: int) -> str:
    value, unit = float(size), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
