"""The work of a refresh job: from snapshots of a tile's factors to its new eigenbases."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from asteria.linalg.method import Method
from asteria.linalg.verified import Failures, verified_refresh
from asteria.runtime.snapshots import Snapshots
from asteria.runtime.transfer import Link, Result

__all__ = ["Refreshed", "refresh_job"]


@dataclass(slots=True)
class Refreshed:
    """What a job hands over: bases that nobody else holds."""

    bases: list[Result | None]
    """(b, n, n) for each mode that has a factor, verified."""
    failures: list[Failures]
    """One for each mode that has a factor."""
    turned: float
    """How far the columns have turned: 1 - cos^2 of the angle, mean over all columns, 0 to 1."""

    @property
    def count(self) -> int:
        """Bases in all."""
        return sum(basis.shape[0] for basis in self.bases if basis is not None)

    @property
    def kept(self) -> list[str]:
        """Why bases are those of the snapshot, one reason for each."""
        return [reason for found in self.failures for reason in found.kept.values()]


def refresh_job(
    snapshots: Snapshots, link: Link, *, method: Method, sort: bool
) -> Callable[[], Refreshed]:
    """Work for a worker thread that refreshes every mode with a factor.

    It holds tensors and nothing else.
    """

    def work() -> Refreshed:
        return _refreshed(snapshots, link, method=method, sort=sort)

    return work


def _refreshed(snapshots: Snapshots, link: Link, *, method: Method, sort: bool) -> Refreshed:
    fresh: list[Result | None] = []
    failures = []
    turned = [0.0]
    for pair in snapshots:
        if pair is None:
            fresh.append(None)
            continue
        factor, stored = pair[0].on_host(), pair[1].on_host()
        basis = stored.to(factor.dtype)
        outcome = verified_refresh(factor, basis, method=method, sort=sort)
        del factor
        fresh_basis = outcome.basis.to(stored.dtype)
        cosines = torch.linalg.vecdot(outcome.basis, basis, dim=-2)
        turned.append(1 - float(cosines.square().mean()))
        del basis, stored
        failures.append(outcome.failures)
        fresh.append(link.outgoing(fresh_basis))
    return Refreshed(fresh, failures, max(turned))
