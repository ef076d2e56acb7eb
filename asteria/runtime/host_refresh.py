"""What a refresh hands over, and the work of one on the host: from snapshots to eigenbases."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from asteria.linalg.method import Method, method_of_kept
from asteria.linalg.packed import unpacked
from asteria.linalg.verified import Failures, verified_refresh
from asteria.runtime.chunks import Chunk
from asteria.runtime.pending import Pending
from asteria.runtime.records import Tile, TilePlan
from asteria.runtime.snapshots import Snapshots, take_snapshots, way_back
from asteria.runtime.transfer import Link, Result

__all__ = ["Refreshed", "host_work", "nothing_new"]


@dataclass(slots=True)
class Refreshed:
    """What a job hands over: bases that nobody else holds."""

    bases: list[Result | None]
    """(b, n, n) for each mode that has a factor, verified."""
    failures: list[Failures]
    """One for each mode that has a factor."""
    turned: float
    """How far the columns have turned: 1 - cos^2 of the angle, mean over all columns, 0 to 1."""
    pending: Pending | None = None
    """What the device knows of it and the host does not; then ``turned`` is 0, without failures."""

    def known(self) -> Refreshed:
        """The same once the host knows all of it; waits for the device. For a worker thread."""
        if self.pending is None:
            return self
        flags = self.pending.report().read(wait=True)
        failures = [] if flags is None else [_failed(mine) for mine in flags.unbind(1)]
        return Refreshed(self.bases, failures, self.turned)

    def join(self) -> None:
        """Let the device's next work, which uses the bases, come after what computes them."""
        if self.pending is not None:
            self.pending.join([b for b in self.bases if isinstance(b, Tensor)])

    @property
    def count(self) -> int:
        """Bases in all."""
        return sum(basis.shape[0] for basis in self.bases if basis is not None)

    @property
    def kept(self) -> list[str]:
        """Why bases are those of the snapshot, one reason for each."""
        return [reason for found in self.failures for reason in found.kept.values()]


def _failed(usable: Tensor) -> Failures:
    return Failures(dict.fromkeys((~usable).nonzero().flatten().tolist(), "no basis on the device"))


def nothing_new(plan: TilePlan, reason: str) -> Refreshed:
    """A refresh that has left every basis of a tile as it was; any thread."""
    kept = dict.fromkeys(range(plan.blocks), reason)
    empty = torch.empty(plan.blocks, 0, 0, device="cpu")
    factored = plan.shape.factored
    failures = [Failures(dict(kept)) for has_basis in factored if has_basis]
    return Refreshed([empty if has_basis else None for has_basis in factored], failures, 0.0)


def host_work(
    chunk: Chunk,
    tile: Tile,
    link: Link,
    *,
    copy_bases: bool,
    method: Method,
    in_memory: bool = False,
) -> Callable[[], Refreshed]:
    """Work for a worker thread that refreshes every mode of a tile that has a factor.

    It starts from now, whatever happens to the chunk meanwhile; ``copy_bases`` as in
    `take_snapshots`. It holds tensors and nothing else. With ``in_memory`` the result does not wait
    on NVMe. For the training thread; never waits.
    """
    extent = chunk.extent
    snapshots = take_snapshots(extent, tile, link, copy_bases=copy_bases)
    home = link if in_memory else way_back(extent, link)
    sort = extent.rule.sorts_columns
    method = method_of_kept(method, in_bases=extent.rule.in_bases)
    return lambda: _refreshed(snapshots, home, method=method, sort=sort)


def _refreshed(snapshots: Snapshots, link: Link, *, method: Method, sort: bool) -> Refreshed:
    fresh: list[Result | None] = []
    failures = []
    turned = [0.0]
    for pair in snapshots:
        if pair is None:
            fresh.append(None)
            continue
        factor, stored = unpacked(pair[0].on_host()), pair[1].on_host()
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
