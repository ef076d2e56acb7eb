"""The methods of a refresh, and which one is used when."""

from __future__ import annotations

from typing import Literal, TypeAlias

from torch import Tensor

from asteria.linalg.eigenbasis import BasisResult, matched_eigh_basis, orthogonal_iteration
from asteria.linalg.ldlr import ldlr

__all__ = ["RESCUES", "Method", "chosen_method", "refreshed"]

Method: TypeAlias = Literal["eigh", "qr", "ldlr"]

RESCUES: dict[Method, tuple[Method, ...]] = {
    "ldlr": ("ldlr", "qr", "eigh"),
    "qr": ("qr", "eigh"),
    "eigh": ("eigh",),
}
"""What is tried in float64, in order, where a method fails in the dtype of the factor."""

_ITERATIONS = 1
"""Orthogonal iterations that an LDLR refresh is worth."""


def refreshed(factor: Tensor, basis: Tensor, *, method: Method, sort: bool) -> BasisResult:
    """New eigenbases by ``method``; ``sort`` is for iterations, as in `orthogonal_iteration`.

    Shapes: factor (b, n, n), basis (b, n, n) -> basis (b, n, n). Allocates, never mutates; any
    thread. `"eigh"` waits for the device, the others do not.
    """
    if method == "eigh":
        return matched_eigh_basis(factor, basis)
    if method == "ldlr":
        return ldlr(factor, basis, sort=sort, iterations=_ITERATIONS)
    return orthogonal_iteration(factor, basis, sort=sort)


def chosen_method(configured: str, *, start: str, first: bool) -> Method:
    """What a ``refresh_method`` and ``start`` of RuntimeConfig mean for a refresh.

    ``first`` of a unit's refreshes: identity bases are nothing to iterate from.
    """
    if configured == "eigh" or (start == "adam" and first):
        return "eigh"
    return "ldlr" if configured == "ldlr" else "qr"
