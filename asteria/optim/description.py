"""The routing of an optimizer as a table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from asteria.algorithms.algorithm import Algorithm
from asteria.config.runtime import RuntimeConfig
from asteria.optim.loading import Named
from asteria.optim.recording import way_of
from asteria.planner.table import aligned, readable_bytes
from asteria.runtime.choices import refresh_texts
from asteria.runtime.records import ParameterRecord, Route, state_dtype
from asteria.runtime.sharding import Sharding

__all__ = ["Description", "ParameterDescription", "describe", "describe_parameter"]


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
    factors_kept: str = ""
    """How, as RuntimeConfig.factors has it; empty where there are none."""
    refreshes: tuple[str, ...] = ()
    """For each block shape where it is refreshed and how, if the parameter is on an accelerator."""
    shards: str = ""
    """Of a sharded parameter: how it is stepped, ``"exact"`` or ``"local"``. Blocks, factors and
    bytes are then those of the whole, or of this rank's shard.
    """
    owner: int | None = None
    """Rank that has the state and steps the whole, if exact; known from the first step on."""


def describe_parameter(
    name: str,
    parameter: Tensor,
    way: Route,
    sharding: Sharding | None = None,
    refreshes: tuple[str, ...] = (),
    kept: str = "full",
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
        factors_kept=kept if way.rule.has_bases else "",
        refreshes=refreshes,
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
        table = [
            ["parameter", "shape", "dtype", "rule", "blocks", "factors", "state"],
            *map(_cells, self.rows),
            ["total", "", "", "", "", "", readable_bytes(self.state_bytes)],
        ]
        if any(row.shards for row in self.rows):
            _append(table, "shards", [row.shards for row in self.rows])
            owners = ["" if row.owner is None else f"rank {row.owner}" for row in self.rows]
            _append(table, "owner", owners)
        if any(row.refreshes for row in self.rows):
            _append(table, "refreshes", [" + ".join(row.refreshes) for row in self.rows])
        return aligned(table)


def _append(table: list[list[str]], head: str, cells: list[str]) -> None:
    for line, cell in zip(table, [head, *(cell or "-" for cell in cells), ""], strict=True):
        line.append(cell)


def describe(
    named: Iterable[Named],
    records: Mapping[Tensor, ParameterRecord],
    rule: Algorithm,
    config: RuntimeConfig,
) -> Description:
    """The routing of parameters; those without a record go the way that ``rule`` gives them now."""
    rows = []
    for _, name, p, group in named:
        if (known := records.get(p)) is not None:
            way, sharding = known.route, known.sharding
        else:
            way, sharding = way_of(name, p, group, rule, config.shards)
        texts = refresh_texts(config, group, p, way)
        rows.append(describe_parameter(name, p, way, sharding, texts, config.factors))
    return Description(tuple(rows))


def _cells(row: ParameterDescription) -> list[str]:
    blocks = " + ".join(f"{count} x {_dims(dims)}" for count, dims in row.blocks)
    factors = " + ".join(", ".join(map(str, sizes)) for sizes in row.factors)
    factors += f", {row.factors_kept}" if row.factors_kept not in ("", "full") else ""
    return [
        row.name,
        _dims(row.shape) or "scalar",
        row.dtype,
        row.rule,
        blocks or "-",
        factors or "-",
        readable_bytes(row.state_bytes),
    ]


def _dims(dims: tuple[int, ...]) -> str:
    return "x".join(map(str, dims))
