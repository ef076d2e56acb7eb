"""Refreshes where factorizations break down, and 3,000 of them in a row."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from asteria.linalg.eigenbasis import eigh_basis, is_orthogonal
from asteria.linalg.method import Method, refreshed
from asteria.linalg.verified import verified_refresh
from benchmarks.refresh_trackers import RotatedTracker, Rounding, cholesky_qr2

BLOCKS = 8
KINDS = (
    "one gradient of rank 1",
    "few gradients of rank 4",
    "condition 1e6",
    "condition 1e9",
    "condition 1e12",
    "half of the rows zero",
    "turned at random now and then",
    "of size 1e-30",
    "of size 1e30",
    "all but identity",
)


@dataclass(slots=True)
class Outcome:
    """What became of the refreshes of a method."""

    refreshes: int = 0
    on_device: int = 0
    """That gave no usable basis at once: a device keeps the old one."""
    saved: int = 0
    """Of these, how many float64 or another method has saved on the host."""
    kept: int = 0
    unhandled: int = 0
    """A basis that is not orthogonal, not finite, or raised."""
    by_kind: dict[str, int] = field(default_factory=dict)
    """`on_device`, by kind of factor."""


def gradients(kind: str, size: int, seed: int) -> Iterator[Tensor]:
    """Gradients (BLOCKS, size, m), float32, of a kind; without end."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(BLOCKS, *shape, generator=draw, dtype=torch.float64)

    rows, index = torch.linalg.qr(normal(size, size)).Q, torch.arange(size, dtype=torch.float64)
    decay = {"condition 1e6": 3.0, "condition 1e9": 4.5, "condition 1e12": 6.0}.get(kind, 0.5)
    scales = (10 ** (-decay * index / (size - 1))).unsqueeze(-1)
    columns = {"one gradient of rank 1": 1, "few gradients of rank 4": 4}.get(kind, size)
    once = normal(size, 1)
    step = 0
    while True:
        step += 1
        gradient = rows @ (scales * normal(size, columns))
        if kind == "one gradient of rank 1":
            gradient = once
        elif kind == "half of the rows zero":
            gradient[:, size // 2 :] = 0
        elif kind == "turned at random now and then" and step % 10 == 0:
            rows, scales = torch.linalg.qr(normal(size, size)).Q, scales.flip(0)
        elif kind == "of size 1e-30":
            gradient *= 1e-15
        elif kind == "of size 1e30":
            gradient *= 1e15
        elif kind == "all but identity":
            gradient = torch.eye(size, dtype=torch.float64).expand_as(gradient) + 1e-6 * gradient
        yield gradient.float()


def count_breakdowns(
    method: Method | None,
    refreshes: int,
    *,
    sizes: tuple[int, ...] = (8, 33, 96),
    seed: int = 0,
) -> Outcome:
    """Refresh near-singular factors so many times; None is CholeskyQR2 of L Q.

    A third of the runs begins with random bases, which no refresh has brought near.
    """
    outcome = Outcome()
    runs = [(kind, size) for size in sizes for kind in KINDS]
    steps = max(1, round(refreshes / (len(runs) * BLOCKS)))
    draw = torch.Generator().manual_seed(seed)
    for number, (kind, size) in enumerate(runs, start=1000 * seed):
        factor = torch.zeros(BLOCKS, size, size)
        basis = torch.empty(0)
        for step, gradient in zip(range(steps + 1), gradients(kind, size, number), strict=False):
            factor = torch.baddbmm(factor, gradient, gradient.mT, beta=0.9, alpha=0.1)
            if step == 0:
                far = torch.randn(factor.shape, generator=draw)
                basis = eigh_basis(factor if number % 3 else far + far.mT).basis
                continue
            basis = _refresh(method, factor, basis, outcome, kind)
    return outcome


def _refresh(
    method: Method | None, factor: Tensor, basis: Tensor, outcome: Outcome, kind: str
) -> Tensor:
    outcome.refreshes += len(factor)
    found = (
        cholesky_qr2(factor, basis)
        if method is None
        else refreshed(factor, basis, method=method, sort=True)
    )
    bad = int((~found.usable).sum())
    outcome.on_device += bad
    outcome.by_kind[kind] = outcome.by_kind.get(kind, 0) + bad
    if method is None:
        outcome.kept += bad
        return torch.where(found.usable[:, None, None], found.basis, basis)
    verified = verified_refresh(factor, basis, method=method, sort=True)
    outcome.saved += verified.failures.retried
    outcome.kept += len(verified.failures.kept)
    outcome.unhandled += int((~is_orthogonal(verified.basis)).sum())
    return verified.basis


def drifts(steps: int, *, size: int = 64, every: int = 100) -> dict[str, list[list[float]]]:
    """[step, error] of factors kept in their eigenbasis over so many steps, by rounding.

    Errors are relative to the roots of the diagonal, against a factor in float64; and, as
    "lack of orthogonality", the largest entry of |Q^T Q - I| up to then.
    """
    trackers: dict[str, RotatedTracker] = {
        "float32": RotatedTracker("float32", _unused),
        "all in TF32": RotatedTracker("TF32", _unused, around=partial(Rounding, "tf32")),
    }
    draw = torch.Generator().manual_seed(0)
    index = torch.arange(size, dtype=torch.float64)
    scales = (10 ** (-2.5 * index / (size - 1))).unsqueeze(-1)
    turn = torch.linalg.matrix_exp(_skew(size, draw))
    vectors = torch.linalg.qr(_normal(size, size, draw)).Q
    factor = ((vectors * scales.square().T) @ vectors.T).unsqueeze(0)
    for tracker in trackers.values():
        tracker.begin(factor.float(), vectors.float().unsqueeze(0))
    found: dict[str, list[list[float]]] = {name: [] for name in trackers}
    for step in range(1, steps + 1):
        vectors = vectors @ turn
        gradient = vectors @ (scales * _normal(size, size // 2, draw)) / (size // 2) ** 0.5
        gradient = gradient.float()
        exact = gradient.double() @ gradient.double().T
        factor = 0.95 * factor + 0.05 * exact
        for name, tracker in trackers.items():
            tracker.advance(step, factor.float(), gradient)
            if step % every == 0:
                found[name].append([step, tracker.drift(factor), tracker.orthogonality])
    if any(tracker.failures for tracker in trackers.values()):
        raise RuntimeError("a refresh of the drift study failed")
    return found


def _unused(factor: Tensor, basis: Tensor) -> object:
    raise NotImplementedError


def _normal(rows: int, columns: int, draw: torch.Generator) -> Tensor:
    return torch.randn(rows, columns, generator=draw, dtype=torch.float64)


def _skew(size: int, draw: torch.Generator) -> Tensor:
    half = _normal(size, size, draw)
    return 2e-3 * (half - half.T) / size**0.5
