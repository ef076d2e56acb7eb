"""Ways to keep an eigenbasis near that of a factor that changes with every step."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from asteria.linalg import precision
from asteria.linalg.eigenbasis import BasisResult, is_orthogonal, orthogonal_iteration
from asteria.linalg.ldlr import ldlr
from asteria.linalg.rotated import conjugated, rotated_ldlr, turn

PRODUCTS = ("mm", "bmm", "addmm", "baddbmm")
Around = Callable[[], contextlib.AbstractContextManager[object]]


class Rounding(TorchDispatchMode):
    """Rounds the inputs of all float32 products, as tensor cores do."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func._schema.name.removeprefix("aten::").rstrip("_")
        if name in PRODUCTS and args[0].dtype == torch.float32:
            last = len(args) - 2  # the one before is added, not multiplied
            args = tuple(self._rounded(x) if i >= last else x for i, x in enumerate(args))
        return func(*args, **(kwargs or {}))

    def _rounded(self, x: Tensor) -> Tensor:
        if self.kind == "none":
            return x
        if self.kind == "bf16":
            return x.bfloat16().float()
        bits = x.contiguous().view(torch.int32)
        return (bits + (1 << 12)).bitwise_and(-(1 << 13)).view(torch.float32)


@contextlib.contextmanager
def permitted(kind: str) -> Iterator[None]:
    """torch may round to ``kind`` (tf32, bf16), and the products that must be exact know it."""
    with (
        mock.patch.object(precision, "_may_round", return_value=True),
        Rounding(kind),
    ):
        yield


def cholesky_qr2(factor: Tensor, basis: Tensor) -> BasisResult:
    """What peers have in place of a QR: CholeskyQR of L Q, twice. Columns by Rayleigh quotient."""
    images = torch.bmm(factor, basis)
    order = (basis * images).sum(-2).argsort(dim=-1, descending=True)
    index = order.unsqueeze(-2).expand_as(images)
    columns = images.gather(-1, index)
    for _ in range(2):
        triangle, _ = torch.linalg.cholesky_ex(torch.bmm(columns.mT, columns))
        columns = torch.linalg.solve_triangular(triangle.mT, columns, upper=True, left=False)
    fresh = torch.empty_like(columns).scatter_(-1, index, columns)
    return BasisResult(fresh, is_orthogonal(fresh))


@dataclass(slots=True)
class Tracker:
    """One way, and what became of one basis with it."""

    label: str
    refresh: Callable[[Tensor, Tensor], BasisResult]
    period: int = 1
    around: Around = contextlib.nullcontext
    stored: torch.dtype = torch.float32
    """Of the basis between two refreshes."""
    basis: Tensor = field(default_factory=lambda: torch.empty(0))
    off: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    orthogonality: float = 0.0
    """Largest entry of |Q^T Q - I| so far."""
    failures: int = 0

    def begin(self, factor: Tensor, basis: Tensor) -> None:
        """Start from an eigenbasis (1, n, n) of the first factor."""
        self.basis = basis.to(self.stored).float()

    def advance(self, step: int, factor: Tensor, gradient: Tensor) -> None:
        """Refresh if it is time; ``factor`` already has the gradient (n, m) in it."""
        if step % self.period:
            return
        with self.around():
            found = self.refresh(factor, self.basis)
        self.take(found.basis, bool(found.usable.all()))

    def take(self, basis: Tensor, usable: bool) -> None:
        """Use a new basis, if it is any good."""
        if not usable:
            self.failures += 1
            return
        self.basis = basis.to(self.stored).float()
        gram = self.basis.double().mT @ self.basis.double()
        worst = (gram - torch.eye(gram.shape[-1], dtype=torch.float64)).abs().max()
        self.orthogonality = max(self.orthogonality, float(worst))

    def measure(self, factor: Tensor, log_spectrum: float, floor: float) -> None:
        """Note how far the basis is from one of ``factor`` (float64, 1, n, n), after the refresh.

        ``log_spectrum`` is the sum of the logarithms of its eigenvalues, ``floor`` what was added.
        """
        size = factor.shape[-1]
        basis = self.basis.double()
        rotated = (basis.mT @ factor @ basis)[0]
        diagonal = rotated.diagonal()
        self.off.append(float((rotated - diagonal.diag()).norm() / factor.norm()))
        self.kl.append(float(((diagonal + floor).log().sum() - log_spectrum) / size))


@dataclass(slots=True)
class RotatedTracker(Tracker):
    """The factor is kept in its eigenbasis."""

    beta: float = 0.95
    iterations: int = 1
    rotated: Tensor = field(default_factory=lambda: torch.empty(0))

    def begin(self, factor: Tensor, basis: Tensor) -> None:
        """See `Tracker`."""
        self.basis, self.rotated = basis, basis.mT @ factor @ basis

    def advance(self, step: int, factor: Tensor, gradient: Tensor) -> None:
        """See `Tracker`."""
        with self.around():
            x = torch.bmm(self.basis.mT, gradient.unsqueeze(0))
            beta = self.beta
            self.rotated = torch.baddbmm(self.rotated, x, x.mT, beta=beta, alpha=1 - beta)
            iterations = self.iterations
            found = rotated_ldlr(self.rotated, self.basis, sort=True, iterations=iterations)
            followed = conjugated(self.rotated, turn(self.basis, found.basis))
        usable = bool(found.usable.all())
        self.take(found.basis, usable)
        self.rotated = followed if usable else self.rotated

    def drift(self, factor: Tensor) -> float:
        """Largest error of the kept factor, relative to the roots of its diagonal."""
        basis = self.basis.double()
        true = basis.mT @ factor.double() @ basis
        unit = true.diagonal(dim1=-2, dim2=-1).clamp_min(1e-300).rsqrt()
        return float(((self.rotated - true) * unit.unsqueeze(-1) * unit.unsqueeze(-2)).abs().max())


def make_trackers() -> list[Tracker]:
    """New ones, in the order of the table."""
    qr, one, two = (
        partial(orthogonal_iteration, sort=True),
        partial(ldlr, sort=True),
        partial(ldlr, sort=True, iterations=2),
    )
    return [
        Tracker("qr", qr),
        Tracker("ldlr, k = 1", one),
        Tracker("ldlr, k = 2", two),
        Tracker("CholeskyQR2 of L Q", cholesky_qr2),
        Tracker("qr, every 2nd step", qr, period=2),
        Tracker("qr, every 5th step", qr, period=5),
        Tracker("qr, every 10th step", qr, period=10),
        Tracker("ldlr, k = 2, every 10th step", two, period=10),
        Tracker("qr, TF32 allowed", qr, around=partial(permitted, "tf32")),
        Tracker("ldlr, k = 1, TF32 allowed", one, around=partial(permitted, "tf32")),
        Tracker("ldlr, k = 2, TF32 allowed", two, around=partial(permitted, "tf32")),
        Tracker("ldlr, k = 1, bf16 allowed", one, around=partial(permitted, "bf16")),
        Tracker("qr, all in TF32", qr, around=partial(Rounding, "tf32")),
        Tracker("ldlr, k = 1, all in TF32", one, around=partial(Rounding, "tf32")),
        Tracker("ldlr, k = 1, all in bf16", one, around=partial(Rounding, "bf16")),
        RotatedTracker("rotated", one),
        RotatedTracker("rotated, k = 2", two, iterations=2),
        RotatedTracker("rotated, TF32 allowed", one, around=partial(permitted, "tf32")),
        RotatedTracker("rotated, bf16 allowed", one, around=partial(permitted, "bf16")),
        RotatedTracker("rotated, all in TF32", one, around=partial(Rounding, "tf32")),
        Tracker("qr, basis stored in bf16", qr, stored=torch.bfloat16),
        Tracker("ldlr, k = 1, basis stored in bf16", one, stored=torch.bfloat16),
    ]
