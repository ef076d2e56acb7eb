"""Factors that are kept in the coordinates of eigenbases: what installs and loads do with them.

A factor takes in gradients that are given in the basis in use, so it has to be given in this one,
too. It is turned where a basis is installed, by what lies between the old and the new basis: what
a refresh has started from has grown since. The turn depends on these two alone and not on who has
computed the new one, so that all ways to a basis, and all ranks, come to the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from asteria.algorithms.algorithm import Algorithm, BlockState, Pair, bases
from asteria.linalg.modes import replace_
from asteria.linalg.rotated import conjugated, in_basis, out_of_basis, turn
from asteria.runtime import rows
from asteria.runtime.extents import Extent, block_parts
from asteria.runtime.records import Tile
from asteria.store.layout import Life

__all__ = ["moved_lives", "recoordinated_", "rotate_", "turn_first_", "with_own_factors"]

_FACTOR = "factor_"


def moved_lives(rule: Algorithm) -> tuple[Life, ...]:
    """What changes when a basis does."""
    return tuple(Life) if rule.in_bases else (Life.STEP, Life.BASIS)


def with_own_factors(extent: Extent, tile: Tile, state: BlockState) -> BlockState:
    """Fields of a tile, with the factors that turn with its bases, if they are kept here.

    These are acquired then, and up to date.
    """
    found = {name: field for name, field in state.items() if not name.startswith(_FACTOR)}
    if extent.rule.in_bases and tile.kept:
        place = extent.place(tile.start, tile.stop, Life.SUM)
        found |= extent.cells[Life.SUM].window(*place)
    return found


def turn_first_(factor: Tensor, basis: Tensor) -> None:
    """A factor of first gradients, which no basis had met, is given in the first ``basis``.

    Shapes (b, n, n).
    """
    factor.copy_(conjugated(factor, basis))


def rotate_(
    rule: Algorithm,
    state: BlockState,
    fresh: list[Tensor | None],
    *,
    scratch: Pair,
    gate: Tensor | None,
    bound: float | None,
) -> None:
    """Carry moments, and factors in ``state`` that turn, over to the ``fresh`` bases.

    Arguments as in `Algorithm.rotate_`, but for ``scratch``: see `rows.rotate_`. The state's bases
    stay.
    """
    if not rule.in_bases:
        rows.rotate_(rule, state, fresh, scratch=scratch, gate=gate, bound=bound)
        return
    for blocks in block_parts(basis for basis in fresh if basis is not None):
        own = {name: field[blocks] for name, field in state.items()}
        near = gate if gate is None or gate.dim() == 0 else gate[blocks]
        turns = [
            None if old is None or new is None else turn(old, new[blocks])
            for old, new in zip(bases(own, len(fresh)), fresh, strict=True)
        ]
        # What is given in no basis, and turned, is given in the turn.
        moments = {name: field for name, field in own.items() if name.startswith("exp_avg")}
        pair = scratch[0][blocks], scratch[1][blocks]
        rows.rotate_(rule, moments, turns, scratch=pair, gate=near, bound=bound)
        for mode, by in enumerate(turns):
            factor = own.get(f"{_FACTOR}{mode}")
            if by is not None and factor is not None:
                wide = near if near is None or near.dim() == 0 else near.view(-1, 1, 1)
                replace_(factor, conjugated(factor, by), wide)


def recoordinated_(
    values: Mapping[str, Tensor], given: Mapping[str, Tensor], *, in_bases: bool
) -> None:
    """Factors as they were saved, (b, n, n), become what is kept here, in place.

    ``given`` has their bases; with ``in_bases`` they are given in these afterwards, else before.
    """
    change = in_basis if in_bases else out_of_basis
    for name, factor in values.items():
        basis = given["basis_" + name.removeprefix(_FACTOR)]
        for blocks in block_parts([factor]):
            own = basis[blocks].to(factor.device, factor.dtype)
            factor[blocks].copy_(change(factor[blocks], own))
