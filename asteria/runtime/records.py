"""How a parameter maps to blocks, and what the runtime remembers about it."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from asteria.algorithms.algorithm import Algorithm, BlockShape
from asteria.config.hyperparameters import FIRST_PERIOD
from asteria.distributed.sharded_layout import local_part
from asteria.errors import ParameterChangedError
from asteria.runtime.entries import Entries
from asteria.runtime.sharding import Sharding, stepped_shape
from asteria.store.layout import FieldSpec, Life

__all__ = ["Fetch", "ParameterRecord", "Route", "Tile", "TilePlan", "is_rebuilt", "state_dtype"]


def is_rebuilt(key: str) -> bool:
    """Whether a state's key belongs to bases and factors, which a gradient can make anew."""
    return key.startswith(("born", "version", "basis_", "factor_", "shadow_"))


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
    def is_whole(self) -> bool:
        """Whether the parameter itself is the region."""
        return not self.slices and self.permutation is None

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

    def place_of(self, plan: TilePlan) -> tuple[str, int, int]:
        """(suffix of its keys, first block of the tile, blocks in all) among those of its shape."""
        suffix, blocks = next((s, n) for s, shape, n in self.extents() if shape == plan.shape)
        earlier = self.tiles[: plan.ordinal]
        return suffix, sum(t.blocks for t in earlier if t.shape == plan.shape), blocks

    def entry_shapes(self, parameter_shape: torch.Size) -> dict[str, tuple[int, ...]]:
        """Key and shape of every state tensor but those of refreshes in flight."""
        shapes: dict[str, tuple[int, ...]] = {"step": ()}
        if self.rule.has_bases:
            shapes |= {"born": (), "version": (len(self.tiles),)}
        for suffix, block, blocks in self.extents():
            for spec in self.rule.fields(block):
                shapes[spec.name + suffix] = self._shown_shape(spec, block, blocks, parameter_shape)
        return shapes

    def slim_shapes(self, parameter_shape: torch.Size) -> dict[str, tuple[int, ...]]:
        """Key and shape of what is left where bases and factors are left out."""
        shapes = self.entry_shapes(parameter_shape)
        return {key: shape for key, shape in shapes.items() if not is_rebuilt(key)}

    def _shown_shape(
        self, spec: FieldSpec, block: BlockShape, blocks: int, parameter_shape: torch.Size
    ) -> tuple[int, ...]:
        """A moment looks like its parameter where it can; one block needs no leading dim."""
        if spec.shape == block.dims and spec.life is Life.STEP and self.keeps_layout:
            return tuple(parameter_shape)
        return spec.shown_shape if blocks == 1 else (blocks, *spec.shown_shape)

    def state_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of all tensors of a state of this dtype, without the step counter."""
        return sum(
            blocks * spec.nbytes(dtype)
            for _, block, blocks in self.extents()
            for spec in self.rule.fields(block)
        )


Fetch: TypeAlias = Callable[[str], Tensor]
"""Asks whoever keeps a tile's factors for one of them, as it is stored, by the field's name."""


@dataclass(slots=True, eq=False)
class Tile:
    """A tile plan with its place: blocks ``start`` to ``stop`` of its extent."""

    record: ParameterRecord
    plan: TilePlan
    start: int
    stop: int
    elsewhere: Fetch | None = None
    """Where its factors are, if another rank keeps them."""

    @property
    def kept(self) -> bool:
        """Whether its factors are kept here."""
        return self.elsewhere is None


class _Referable:
    """What may be referred to weakly, although it has slots."""

    __slots__ = ("__weakref__",)


@dataclass(slots=True, eq=False)
class ParameterRecord(_Referable):
    """What the runtime knows about one parameter that has state. Training thread only."""

    parameter: Tensor
    name: str
    index: int
    """Position among all parameters of the optimizer."""
    route: Route
    shape: torch.Size
    """Of what is stepped: the parameter, or this rank's shard of it."""
    dtype: torch.dtype
    device: torch.device
    sharding: Sharding | None = None
    """How ranks share it, if it is a sharded parameter."""
    steps: int = 0
    """Updates of the moments so far."""
    begun: bool = False
    """Whether the gradient that the factors begin with has been seen."""
    born: int = 1
    """Updates before that gradient; more than there were as long as it has not come."""
    versions: list[int] = field(default_factory=list)
    """Of each tile: the step whose factors its eigenbases were computed from."""
    entries: Entries = field(default_factory=Entries)
    """The state as the optimizer shows it: views of it, and counters on the host."""
    counter: array[float] = field(default_factory=lambda: array("f", [0]))
    """``steps`` in the memory of the tensor that is shown; an operation on it would take longer."""
    facade: Entries | None = None
    """What the optimizer shows instead, for a sharded parameter; all of it is made when asked for.
    """

    shown: tuple[tuple[str, Tensor | None], ...] = ()
    """What was put into ``entries``, to see whether anybody replaces it; None is away."""
    options: tuple[object, ...] = ()
    """Of the group, as far as the route depends on them."""
    refresh_steps: int = FIRST_PERIOD
    """Steps between refreshes, as its group says."""
    has_foreign_factors: bool = False
    """Whether factors that are loaded are in other coordinates than those that are kept here."""
    in_flight: tuple[str, ...] = ()
    """Entries that tell of refreshes in flight, made when they are asked for."""

    @classmethod
    def of(
        cls,
        parameter: Tensor,
        name: str,
        index: int,
        *,
        route: Route,
        options: tuple[object, ...] = (),
        refresh_steps: int = FIRST_PERIOD,
        sharding: Sharding | None = None,
    ) -> ParameterRecord:
        """A record of the parameter as it is now, which has no state yet."""
        return cls(
            parameter=parameter,
            name=name,
            index=index,
            route=route,
            shape=stepped_shape(parameter, sharding),
            dtype=parameter.dtype,
            device=parameter.device,
            options=options,
            refresh_steps=refresh_steps,
            sharding=sharding,
        )

    @property
    def is_here(self) -> bool:
        """Whether this process has the state, and steps it."""
        return self.sharding is None or self.sharding.is_here

    @property
    def as_sharded(self) -> Sharding:
        """How it is sharded, where nothing else comes."""
        if self.sharding is None:
            raise RuntimeError(f"{self.name} is not sharded")
        return self.sharding

    @property
    def is_exact(self) -> bool:
        """Whether it is sharded, and stepped as a whole by its owner."""
        return self.sharding is not None and self.sharding.exact

    @property
    def weight(self) -> Tensor:
        """The weights in this process: the parameter, or this rank's shard of it."""
        return self.parameter if self.sharding is None else local_part(self.parameter)

    @property
    def gradient(self) -> Tensor | None:
        """Of ``shape``; of a sharded parameter during a step only."""
        if self.sharding is None:
            return self.parameter.grad
        return self.sharding.gradient if self.sharding.exact else self.sharding.local_gradient

    @property
    def seen_gradient(self) -> Tensor | None:
        """What this process has of it when a step begins: of the shape of ``weight``.

        In place of an empty one, of which other ranks may have more, a single zero.
        """
        gradient = self.parameter.grad
        if self.sharding is None or gradient is None:
            return gradient
        gradient = self.sharding.take_gradient(gradient)
        return gradient if gradient.numel() else gradient.new_zeros(1)

    @property
    def has_moments(self) -> bool:
        """Whether there are moments to go on with, be it without bases."""
        return self.begun or self.steps > 0

    def begin(self) -> None:
        """The first gradient is there; for the bases, not for moments that were loaded."""
        if not self.begun:
            self.begun = True
            self.born = self.steps
            if "born" in self.entries:
                self.entries["born"].fill_(self.born)

    def set_version(self, ordinal: int, version: int) -> None:
        """The bases of a tile are of this step's factors from now on."""
        self.versions[ordinal] = version
        self.entries["version"][ordinal] = version

    def shows(self, entries: Mapping[str, Tensor] | None) -> bool:
        """Whether ``entries`` is this record's state, with every tensor as it was put there.

        Others may keep tensors of their own beside ours.
        """
        if self.facade is not None:
            return entries is self.facade and self.facade.is_untouched
        own = self.entries
        if entries is own and own.changed:
            own.changed = not (
                all(map(own.is_away, self.in_flight))
                and all(
                    own.is_away(key) if tensor is None else dict.get(own, key) is tensor
                    for key, tensor in self.shown
                )
            )
        return entries is own and not own.changed

    def check_unchanged(self) -> None:
        """Raise ParameterChangedError unless shape, dtype and device are as they were."""
        now, sharding = self.parameter, self.sharding
        shape = now.shape if sharding is None else stepped_shape(now, sharding)
        if shape == self.shape and now.dtype == self.dtype and now.device == self.device:
            return
        raise ParameterChangedError(
            f"{self.name}: its state was made for shape {tuple(self.shape)}, {self.dtype} on "
            f"{self.device}, now it has shape {tuple(shape)}, {now.dtype} on {now.device}. "
            "Move or convert the model before the first step, or make a new optimizer; "
            "`del optimizer.state[parameter]` starts this parameter afresh"
        )
