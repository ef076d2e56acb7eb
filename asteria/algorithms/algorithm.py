"""What an optimizer's mathematics offers to the step loop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from asteria.config.hyperparameters import Hyperparameters
from asteria.store.stack import FieldSpec

__all__ = ["Algorithm", "BlockShape", "BlockState", "Pair", "bases", "factors"]

BlockState = Mapping[str, Tensor]
"""The fields of b stacked blocks, by name; every tensor is (b, *shape of the field)."""

Pair = tuple[Tensor, Tensor]
"""Two scratch tensors of the gradient's shape (b, d_0, ..., d_{r-1})."""


@dataclass(frozen=True, slots=True)
class BlockShape:
    """The dims of a block, and which of its modes have a Kronecker factor.

    A block without modes is a single element: the AdamW rule.
    """

    dims: tuple[int, ...]
    factored: tuple[bool, ...]

    def factor_sizes(self) -> tuple[int, ...]:
        """Sizes of the Kronecker factors, by mode."""
        return tuple(n for n, factored in zip(self.dims, self.factored, strict=True) if factored)

    def factor_fields(self) -> tuple[FieldSpec, ...]:
        """Factor and eigenbasis of every factored mode, (n, n) each."""
        return tuple(
            FieldSpec(f"{kind}_{mode}", (size, size), by_columns=kind == "basis")
            for kind in ("factor", "basis")
            for mode, (size, factored) in enumerate(zip(self.dims, self.factored, strict=True))
            if factored
        )


def factors(state: BlockState, rank: int) -> list[Tensor | None]:
    """The factor (b, d_k, d_k) of every mode, None where there is none."""
    return [state.get(f"factor_{mode}") for mode in range(rank)]


def bases(state: BlockState, rank: int) -> list[Tensor | None]:
    """The eigenbasis (b, d_k, d_k) of every mode, None where there is none."""
    return [state.get(f"basis_{mode}") for mode in range(rank)]


class Algorithm(Protocol):
    """One optimizer's rule for a stack of same-shaped blocks.

    Every method works in place on ``state``, takes gradients (b, *dims) in the state's dtype, and
    may be called from any thread that owns the state. ``gate`` is None, or a scalar tensor
    of the state's dtype that is 0 when nothing may change (the host does not know), else 1.
    """

    name: str
    """Of the rule, as ``describe()`` shows it."""
    has_bases: bool
    """Whether its blocks have eigenbases."""
    squeezes: bool
    """Whether it takes tensors with fewer than two dims above 1 for vectors."""
    sorts_columns: bool
    """Whether a refresh orders the eigenbasis' columns by eigenvalue."""

    def fields(self, block: BlockShape) -> tuple[FieldSpec, ...]:
        """The state of one block."""

    def begin_(self, state: BlockState, gradient: Tensor, hyper: Hyperparameters) -> None:
        """First statistics, from the first gradient; the bases are computed from them."""

    def direction_(
        self,
        state: BlockState,
        gradient: Tensor,
        hyper: Hyperparameters,
        *,
        step: int,
        scratch: Pair,
        gate: Tensor | None,
    ) -> tuple[Tensor, float]:
        """Advance the moments; the update (b, *dims), in scratch, and a factor on the lr.

        ``step`` counts from 1.
        """

    def accumulate_(
        self,
        state: BlockState,
        gradient: Tensor,
        hyper: Hyperparameters,
        *,
        scratch: Pair,
        gate: Tensor | None,
    ) -> None:
        """Fold the gradient into the factors."""

    def rotate_(
        self,
        state: BlockState,
        fresh: list[Tensor | None],
        *,
        scratch: Pair,
        gate: Tensor | None,
        bound: float | None = None,
    ) -> None:
        """Carry the moments over from the bases in ``state`` to the ``fresh`` ones.

        ``fresh[k]`` (b, d_k, d_k) is None for a mode without a basis; the state's bases stay. The
        second moment is lifted where the first is more than ``bound`` times its root.
        """
