"""Bases that a device computes beside the training, as long as the host knows nothing of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from asteria.algorithms.algorithm import BlockState
from asteria.linalg.method import Method
from asteria.runtime.reports import Report
from asteria.runtime.side import Passed, Side

__all__ = ["Pending", "chosen"]


@dataclass(slots=True, eq=False)
class Pending:
    """What a device computes for one tile, or has computed. For the training thread."""

    side: Side
    passed: Passed
    usable: list[Tensor | None]
    """(b,) bool on the device for every mode; None where there is no basis."""
    told: Tensor
    """(b, modes with a basis) the same in host memory, valid once ``passed``."""
    share: float
    """Of the work until ``passed``."""
    method: Method

    def join(self, bases: Sequence[Tensor | None]) -> None:
        """Let the device's next work, which uses ``bases``, come after this one."""
        used = [tensor for tensor in (*bases, *self.usable) if tensor is not None]
        self.side.join(self.passed, used)

    def report(self) -> Report:
        """One flag for each basis."""
        return Report(self.told, self.passed)

    def seconds(self) -> float:
        """The tile's part of what the work took on the device; once it is passed."""
        return self.share * self.passed.seconds()


def chosen(
    state: BlockState, fresh: Sequence[Tensor | None], pending: Pending
) -> tuple[list[Tensor | None], Tensor]:
    """What to install: (bases of every mode, gate of each block), decided on the device.

    A basis that cannot be used is the one in ``state``; the gate (b, 1, ..., 1) is 0 for blocks
    that keep all of theirs, whose moments must keep every bit.
    """
    picked: list[Tensor | None] = []
    gate: Tensor | None = None
    for mode, (basis, usable) in enumerate(zip(fresh, pending.usable, strict=True)):
        if basis is None or usable is None:
            picked.append(None)
            continue
        picked.append(torch.where(usable[:, None, None], basis, state[f"basis_{mode}"]))
        gate = usable if gate is None else gate | usable
    if gate is None:
        raise RuntimeError("a refresh without any basis was to be installed")
    return picked, gate.view(-1, *[1] * len(fresh))
