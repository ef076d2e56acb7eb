"""What an optimizer's mathematics offers to the step loop."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from asteria.config.hyperparameters import Hyperparameters
from asteria.config.runtime import Factors
from asteria.linalg.modes import decay_gram_
from asteria.linalg.packed import packed_shape
from asteria.store.layout import FieldSpec, Life

__all__ = [
    "Algorithm",
    "BlockShape",
    "BlockState",
    "Contribution",
    "Pair",
    "accumulate_",
    "bases",
    "begin_",
    "fold_",
]

BlockState = Mapping[str, Tensor]
"""The fields of b stacked blocks, by name; every tensor is (b, *shape of the field)."""

Pair = tuple[Tensor, Tensor]
"""Two scratch tensors of the gradient's shape (b, d_0, ..., d_{r-1})."""


class Contribution(NamedTuple):
    """A factor becomes beta times itself plus ``weight`` X_(k) X_(k)^T, k the ``mode``."""

    mode: int
    x: Tensor
    """(b, d_0, ..., d_{r-1})."""
    weight: float
    again: bool = False
    """Whether ``x`` has the values of the contribution before."""


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

    def factor_fields(
        self, bases_in: torch.dtype | None = None, form: Factors = "full"
    ) -> tuple[FieldSpec, ...]:
        """Factor and eigenbasis of every factored mode, (n, n) each; of a packed factor half of it.

        ``bases_in`` is what eigenbases are stored in where the state is float32.
        """
        sizes = [(m, n) for m, n in enumerate(self.dims) if self.factored[m]]
        packed = form == "packed"
        factors = [
            FieldSpec(
                f"factor_{m}",
                packed_shape(n) if packed else (n, n),
                life=Life.SUM,
                half_of=n if packed else None,
            )
            for m, n in sizes
        ]
        bases = [
            FieldSpec(f"basis_{m}", (n, n), by_columns=True, life=Life.BASIS, narrow=bases_in)
            for m, n in sizes
        ]
        return (*factors, *bases)


def bases(state: BlockState, rank: int) -> list[Tensor | None]:
    """The eigenbasis (b, d_k, d_k) of every mode, None where there is none."""
    return [state.get(name) for name in _basis_names(rank)]


@functools.cache
def _basis_names(rank: int) -> tuple[str, ...]:
    return tuple(f"basis_{mode}" for mode in range(rank))


def accumulate_(
    rule: Algorithm,
    state: BlockState,
    gradient: Tensor,
    hyper: Hyperparameters,
    *,
    scratch: Pair,
    gate: Tensor | None,
) -> None:
    """Fold the gradient into the factors, in place; arguments as in `Algorithm.direction_`."""
    for given in rule.contributions(state, gradient, hyper, scratch=scratch, gate=gate):
        fold_(state, given, hyper.shampoo_beta, gate)


def begin_(rule: Algorithm, state: BlockState, gradient: Tensor, hyper: Hyperparameters) -> None:
    """First statistics, from the first gradient; the bases are computed from them."""
    for given in rule.first_contributions(state, gradient, hyper):
        fold_(state, given, hyper.shampoo_beta, None)


def fold_(state: BlockState, given: Contribution, beta: float, gate: Tensor | None) -> None:
    """Fold one contribution into its factor, in place, unless ``gate`` is 0."""
    factor = state[f"factor_{given.mode}"]
    decay_gram_(factor, given.x, given.mode, beta=beta, weight=given.weight, gate=gate)


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

    bases_in: torch.dtype | None
    """What eigenbases are stored in where the state is float32; None is that. Bases that are handed
    to its methods have the dtype of the state.
    """

    factors: Factors
    """How factors are stored, as in RuntimeConfig; so they are handed to `fold_`."""

    rows_alike: bool
    """Whether the rows of a block without a factor for them can be updated one after the other."""

    @property
    def can_defer(self) -> bool:
        """Whether it asks `do` for all that an update of vectors or matrices without a gate takes.

        So that it may be written down before anything of it is done.
        """

    @property
    def in_bases(self) -> bool:
        """Whether factors are kept in the coordinates of the eigenbases in use, Q^T L Q.

        Gradients, all but the first, are then given to its methods in these coordinates, too;
        whoever installs new bases turns the factors.
        """

    def storing(self, bases_in: torch.dtype | None, factors: Factors) -> Algorithm:
        """The same rule with eigenbases stored in this dtype, None is that of the state.

        ``factors`` as in RuntimeConfig.
        """

    def fields(self, block: BlockShape) -> tuple[FieldSpec, ...]:
        """The state of one block."""

    def first_contributions(
        self, state: BlockState, gradient: Tensor, hyper: Hyperparameters
    ) -> Iterator[Contribution]:
        """What the first gradient adds to factors that begin at zero; otherwise as `contributions`.

        The first bases are computed from it.
        """

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

    def scale(self, hyper: Hyperparameters, step: int) -> float:
        """The factor on the lr that `direction_` returns; does not need the state."""

    def contributions(
        self,
        state: BlockState,
        gradient: Tensor,
        hyper: Hyperparameters,
        *,
        scratch: Pair,
        gate: Tensor | None,
    ) -> Iterator[Contribution]:
        """What the gradient adds to the factors; all of them must be taken.

        Each is valid until the next is asked for. Advances all other statistics, and does not look
        at the factors, which may be elsewhere.
        """

    def contributed_tensors(self, block: BlockShape) -> int:
        """Different tensors among the contributions of a step."""

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

    def project_moments_(self, state: BlockState, *, scratch: Pair, bound: float) -> None:
        """Carry a first moment in the parameter's space over to the state's bases.

        They have been made from one gradient, columns by decreasing eigenvalue. ``bound`` as in
        `rotate_`.
        """
