"""How a parameter maps to blocks, and what the runtime remembers about it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from asteria.algorithms.algorithm import Algorithm, BlockShape, BlockState
from asteria.errors import ParameterChangedError
from asteria.store.stack import FieldSpec, Stack

__all__ = ["Extent", "ExtentKey", "ParameterRecord", "Route", "Tile", "TilePlan", "state_dtype"]


def state_dtype(parameter: Tensor) -> torch.dtype:
    """The dtype of a parameter's state: float64 for float64, else float32."""
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32


@dataclass(frozen=True, slots=True)
class TilePlan:
    """A region of a parameter that holds ``blocks`` neighbouring blocks of one shape."""

    shape: BlockShape
    blocks: int
    slices: tuple[slice, ...] = ()
    """Of the parameter's first dims; empty is the whole parameter."""
    permutation: tuple[int, ...] | None = None
    """Order in which the block wants the parameter's dims (channels_last)."""
    ordinal: int = 0
    """Position among the parameter's tiles."""

    @property
    def refresh_cost(self) -> float:
        """Of all its blocks and modes, in units of an element of a matrix product."""
        return float(self.blocks * sum(size**3 for size in self.shape.factor_sizes()))

    def region(self, tensor: Tensor) -> Tensor:
        """The view of a parameter-shaped tensor that this tile is made of."""
        view = tensor[self.slices] if self.slices else tensor
        return view if self.permutation is None else view.permute(self.permutation)


@dataclass(frozen=True, slots=True)
class Route:
    """The rule of a parameter and the tiles it consists of."""

    rule: Algorithm
    tiles: tuple[TilePlan, ...]
    keeps_layout: bool
    """Whether the tiles in order are the parameter's elements in order."""

    def extents(self) -> Iterator[tuple[str, BlockShape, int]]:
        """(suffix of the state's keys, block shape, blocks) for each distinct block shape."""
        shapes = list(dict.fromkeys(tile.shape for tile in self.tiles))
        for index, shape in enumerate(shapes):
            blocks = sum(tile.blocks for tile in self.tiles if tile.shape == shape)
            yield ("" if len(shapes) == 1 else f".{index}"), shape, blocks

    def entry_shapes(self, parameter_shape: torch.Size) -> dict[str, tuple[int, ...]]:
        """Key and shape of every state tensor; ``step`` and ``version`` count on the host."""
        shapes: dict[str, tuple[int, ...]] = {"step": ()}
        if self.rule.has_bases:
            shapes["version"] = (len(self.tiles),)
        for suffix, block, blocks in self.extents():
            for spec in self.rule.fields(block):
                shapes[spec.name + suffix] = self._shown_shape(spec, block, blocks, parameter_shape)
        return shapes

    def _shown_shape(
        self, spec: FieldSpec, block: BlockShape, blocks: int, parameter_shape: torch.Size
    ) -> tuple[int, ...]:
        """A moment looks like its parameter where it can; one block needs no leading dim."""
        if spec.shape == block.dims and self.keeps_layout:
            return tuple(parameter_shape)
        return spec.shape if blocks == 1 else (blocks, *spec.shape)

    def state_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of all state tensors, without the step counter."""
        return dtype.itemsize * sum(
            blocks * math.prod(spec.shape)
            for _, block, blocks in self.extents()
            for spec in self.rule.fields(block)
        )


@dataclass(slots=True)
class Tile:
    """A tile plan with its place: blocks ``start`` to ``stop`` of ``extent``'s stack."""

    record: ParameterRecord
    plan: TilePlan
    start: int
    stop: int


class ExtentKey(NamedTuple):
    """What blocks must have in common to live in one stack."""

    rule: Algorithm
    shape: BlockShape
    dtype: torch.dtype
    device: torch.device


@dataclass(slots=True)
class Extent:
    """A stack with the tiles that live in it, in order of their place."""

    rule: Algorithm
    shape: BlockShape
    stack: Stack
    tiles: list[Tile] = field(default_factory=list)
    windows: dict[tuple[int, int], BlockState] = field(default_factory=dict)
    """Views of the stack that the last steps used, by their first and last block."""


@dataclass(slots=True, eq=False)
class ParameterRecord:
    """What the runtime knows about one parameter that has state. Training thread only."""

    parameter: Tensor
    name: str
    index: int
    """Position among all parameters of the optimizer."""
    route: Route
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    steps: int = 0
    """Updates of the moments so far."""
    begun: bool = False
    """Whether the first gradient has been seen."""
    versions: list[int] = field(default_factory=list)
    """Of each tile: the step whose factors its eigenbases were computed from."""
    entries: dict[str, Tensor] = field(default_factory=dict)
    """The state as the optimizer shows it: views of the stacks, and counters on the host."""

    shown: tuple[tuple[str, Tensor], ...] = ()
    """What was put into ``entries``, to see whether anybody replaces it."""
    options: tuple[object, ...] = ()
    """Of the group, as far as the route depends on them."""

    @classmethod
    def of(
        cls,
        parameter: Tensor,
        name: str,
        index: int,
        *,
        route: Route,
        options: tuple[object, ...] = (),
    ) -> ParameterRecord:
        """A record of the parameter as it is now, which has no state yet."""
        return cls(
            parameter=parameter,
            name=name,
            index=index,
            route=route,
            shape=parameter.shape,
            dtype=parameter.dtype,
            device=parameter.device,
            options=options,
        )

    def set_version(self, ordinal: int, version: int) -> None:
        """The bases of a tile are of this step's factors from now on."""
        self.versions[ordinal] = version
        self.entries["version"][ordinal] = version

    def shows(self, entries: Mapping[str, Tensor] | None) -> bool:
        """Whether ``entries`` is this record's state, with every tensor as it was put there.

        Others may keep tensors of their own beside ours.
        """
        return entries is self.entries and all(
            entries.get(key) is tensor for key, tensor in self.shown
        )

    def check_unchanged(self) -> None:
        """Raise ParameterChangedError unless shape, dtype and device are as they were."""
        now = self.parameter
        if now.shape == self.shape and now.dtype == self.dtype and now.device == self.device:
            return
        raise ParameterChangedError(
            f"{self.name}: its state was made for shape {tuple(self.shape)}, {self.dtype} on "
            f"{self.device}, now it has shape {tuple(now.shape)}, {now.dtype} on {now.device}. "
            "Move or convert the model before the first step, or make a new optimizer; "
            "`del optimizer.state[parameter]` starts this parameter afresh"
        )
