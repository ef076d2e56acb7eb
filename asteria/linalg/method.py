"""The methods of a refresh, and which one is used when."""

from __future__ import annotations

from typing import Literal, TypeAlias

from torch import Tensor

from asteria.linalg.eigenbasis import BasisResult, matched_eigh_basis, orthogonal_iteration
from asteria.linalg.ldlr import ldlr
from asteria.linalg.rotated import rotated_eigh, rotated_ldlr

__all__ = ["ITERATIONS", "RESCUES", "Method", "chosen_method", "method_of_kept", "refreshed"]

Method: TypeAlias = Literal["eigh", "qr", "ldlr", "rotated_eigh", "rotated_ldlr"]
"""The last two are for factors that are kept in the coordinates of their basis."""

RESCUES: dict[Method, tuple[Method, ...]] = {
    "ldlr": ("ldlr", "qr", "eigh"),
    "qr": ("qr", "eigh"),
    "eigh": ("eigh",),
    "rotated_ldlr": ("rotated_ldlr", "rotated_eigh"),
    "rotated_eigh": ("rotated_eigh",),
}
"""What is tried in float64, in order, where a method fails in the dtype of the factor."""

ITERATIONS = 1
"""Orthogonal iterations that an LDLR refresh is worth."""


def refreshed(factor: Tensor, basis: Tensor, *, method: Method, sort: bool) -> BasisResult:
    """New eigenbases by ``method``; ``sort`` is for iterations, as in `orthogonal_iteration`.

    Shapes: factor (b, n, n), basis (b, n, n) -> basis (b, n, n). Allocates, never mutates; any
    thread. Those with eigenvectors wait for the device, the others do not.
    """
    if method == "rotated_eigh":
        return rotated_eigh(factor, basis)
    if method == "rotated_ldlr":
        return rotated_ldlr(factor, basis, sort=sort, iterations=ITERATIONS)
    if method == "eigh":
        return matched_eigh_basis(factor, basis)
    if method == "ldlr":
        return ldlr(factor, basis, sort=sort, iterations=ITERATIONS)
    return orthogonal_iteration(factor, basis, sort=sort)


def chosen_method(configured: str, *, start: str, first: bool) -> Method:
    """What a ``refresh_method`` and ``start`` of RuntimeConfig mean for a refresh.

    ``first`` of a unit's refreshes: identity bases are nothing to iterate from.
    """
    if configured == "eigh" or (start == "adam" and first):
        return "eigh"
    return "ldlr" if configured == "ldlr" else "qr"


def method_of_kept(method: Method, *, in_bases: bool) -> Method:
    """``method`` for factors as they are kept: `Algorithm.in_bases`, in the coordinates of bases.

    There is no QR then: what it would find is a turn, and turns upon turns cease to be orthogonal.
    """
    if not in_bases:
        return method
    return "rotated_eigh" if method == "eigh" else "rotated_ldlr"
