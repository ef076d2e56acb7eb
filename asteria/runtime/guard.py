"""Keeping non-finite gradients away from factors, moments and weights.

On the host one look decides before anything changes. On an accelerator a look would make the host
wait at every step, so there the decision stays on the device: a scalar gate that is 1, or 0 to
leave everything as it is. The host reads it at a later step, when it has long arrived, and takes
the step off its counters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from asteria.errors import NonFiniteGradientError
from asteria.runtime.reports import Report

__all__ = [
    "DeviceGuard",
    "FlagsReducer",
    "bad_names",
    "finite_flags",
    "gate_on",
    "nonfinite_error",
    "surely_finite",
]


_WIDE = (torch.float32, torch.float64)


class FlagsReducer(Protocol):
    """Where several ranks share gradients: what makes one decision of theirs."""

    def reduce_(self, flags: Tensor) -> None:
        """Make ``flags`` (bool), in the order of the gradients, false where any rank's are."""


def surely_finite(gradients: list[Tensor]) -> bool:
    """A quick look at gradients on the host; False asks for `finite_flags`.

    Norms in float16 may overflow where those in the dtype of the state do not.
    """
    if all(g.is_contiguous() and g.dtype in _WIDE for g in gradients):
        # A pass through memory by a faster kernel.
        flat = [g if g.dim() == 1 else g.view(-1) for g in gradients]
        return math.isfinite(sum([torch.dot(vector, vector).item() for vector in flat]))
    return math.isfinite(sum(float(norm) for norm in torch._foreach_norm(gradients, 2)))


def finite_flags(names: Sequence[str], gradients: Sequence[Tensor]) -> tuple[list[str], Tensor]:
    """Whether each gradient can be used: names, and (len(names),) bool.

    It can if the sum of its squares is finite in the dtype of the state: an inf or nan, or an
    element whose square overflows, would stay in the second moment and the factors for good.
    The names come in the order of the flags; empty gradients are left out. The flags are on the
    device of the first gradient that is on one, not on the host, which would have to wait for it.
    """
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, gradient in enumerate(gradients):
        if gradient.numel():
            groups.setdefault((gradient.device, gradient.dtype), []).append(index)
    devices = [gradient.device for gradient in gradients]
    device = next((device for device in devices if device.type != "cpu"), devices[0])
    order = [names[index] for members in groups.values() for index in members]
    flags = [
        _are_finite([gradients[index] for index in members]).to(device, non_blocking=True)
        for members in groups.values()
    ]
    return order, torch.cat([torch.ones(0, dtype=torch.bool, device=device), *flags])


def _are_finite(gradients: list[Tensor]) -> Tensor:
    """(len,) bool for gradients of one device and dtype."""
    dtype = torch.promote_types(gradients[0].dtype, torch.float32)
    return torch.stack(list(torch._foreach_norm(gradients, 2, dtype=dtype))).isfinite()


def gate_on(gate: Tensor | None, device: torch.device, dtype: torch.dtype) -> Tensor | None:
    """The gate where it is needed. Only a host waits for it, for it looks at what is there."""
    if gate is None:
        return None
    return gate.to(device=device, dtype=dtype, non_blocking=device.type != "cpu")


def bad_names(names: Sequence[str], gradients: Sequence[Tensor]) -> list[str]:
    """Names of those that are not finite; waits for their devices."""
    names, flags = finite_flags(names, gradients)
    return [name for name, ok in zip(names, flags.tolist(), strict=True) if not ok]


def nonfinite_error(names: Sequence[str]) -> NonFiniteGradientError:
    """The error for gradients of these names."""
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return NonFiniteGradientError(
        f"the gradient of {shown} holds inf or nan, or is too large to be squared; weights and "
        "optimizer state were left as they were. Find its cause (loss scale, learning rate, data), "
        'skip such steps with RuntimeConfig(nonfinite="skip"), or let a GradScaler decide'
    )


@dataclass(slots=True)
class _Verdict:
    report: Report
    """(parameters,) bool."""
    names: list[str]
    undo: Callable[[], None] | None = None

    def bad_names(self, *, wait: bool) -> list[str] | None:
        """Names with a non-finite gradient; None if the flags have not arrived."""
        flags = self.report.read(wait=wait)
        if flags is None:
            return None
        return [n for n, ok in zip(self.names, flags.tolist(), strict=True) if not ok]


class DeviceGuard:
    """Gates steps on the device and reports to the host afterwards. Training thread only."""

    def __init__(self) -> None:
        self._verdicts: list[_Verdict] = []

    def gate(
        self,
        gradients: Sequence[Tensor],
        names: list[str],
        together: FlagsReducer | None = None,
    ) -> Tensor:
        """A float32 scalar on the gradients' device: 1 if all are finite, else 0. Never waits.

        ``together`` makes the flags of all ranks out of this one's.
        """
        names, flags = finite_flags(names, gradients)
        if together is not None:
            together.reduce_(flags)
        self._verdicts.append(_Verdict(Report.of(flags), names))
        return flags.all().to(torch.float32)

    def on_refusal(self, undo: Callable[[], None]) -> None:
        """What the host has to take back, once it learns that the latest gate was closed."""
        self._verdicts[-1].undo = undo

    def collect(self, *, wait: bool = False) -> list[list[str]]:
        """Names of each gated-off step whose verdict has arrived; every step is told once.

        With ``wait``, all verdicts are waited for.
        """
        bad_steps = []
        while self._verdicts:
            names = self._verdicts[0].bad_names(wait=wait)
            if names is None:
                break
            undo = self._verdicts.pop(0).undo
            if names:
                bad_steps.append(names)
                if undo is not None:
                    undo()
        return bad_steps
