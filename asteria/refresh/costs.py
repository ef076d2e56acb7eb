"""What refreshes and updates take, by size, where nobody has measured it.

The host's seconds are those of one core of a modest server. The accelerator's are estimates for one
that multiplies 50e12 float32 numbers a second, and are not measured: products at half its rate, and
what a Cholesky factorization and a triangular solve wait for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

from asteria.linalg.method import Method

__all__ = [
    "HOST_LDLR_SHARE",
    "HOST_S",
    "Timings",
    "device_seconds",
    "host_seconds",
    "interpolated",
    "update_seconds",
]

Timings: TypeAlias = tuple[tuple[int, float], ...]
"""(size of a factor, seconds), by increasing size."""

HOST_S: Timings = ((256, 0.0025), (512, 0.0095), (1024, 0.065), (2048, 0.44))
"""Of one orthogonal iteration by QR, in float32 on one thread."""
HOST_LDLR_SHARE = 2.0
"""Of the time of a QR refresh, by LDLR: 1.3 for factors of 64, 1.7 to 1.95 from 256 on."""
_DEVICE_S: dict[Method, Timings] = {
    "qr": ((256, 6e-4), (512, 1.2e-3), (1024, 3e-3), (2048, 7e-3), (4096, 0.034), (8192, 0.2)),
    "ldlr": (
        (256, 2.5e-4),
        (512, 5e-4),
        (1024, 1.3e-3),
        (2048, 3.2e-3),
        (4096, 0.015),
        (8192, 0.097),
    ),
}
_DEVICE_FLOP_PER_S = 25e12


def interpolated(known: Timings, size: int) -> float:
    """Seconds for a size: on a straight line of logarithms, beyond the ends by the cube."""
    above = next((place for place, (n, _) in enumerate(known) if n >= size), len(known))
    if above in (0, len(known)):
        n, seconds = known[min(above, len(known) - 1)]
        return seconds * (size / n) ** 3
    (low, low_s), (high, high_s) = known[above - 1], known[above]
    share = math.log(size / low) / math.log(high / low)
    return math.exp((1 - share) * math.log(low_s) + share * math.log(high_s))


def host_seconds(size: int, threads: int, *, method: Method) -> float:
    """Of refreshing one factor (size, size) by so many threads of a host; no eigensolver."""
    share = HOST_LDLR_SHARE if method == "ldlr" else 1.0
    return share * interpolated(HOST_S, size) / threads


def device_seconds(size: int, *, method: Method, speed: float) -> float:
    """Of refreshing one factor on an accelerator of this ``speed``, 1 being that of the tables."""
    return interpolated(_DEVICE_S[method], size) / speed


def update_seconds(dims: Sequence[int], factors: Sequence[int], *, speed: float) -> float:
    """Of one block's products in a step, on an accelerator: three for each factor.

    ``dims`` of the block and sizes of its ``factors``.
    """
    return sum(6.0 * math.prod(dims) * size for size in factors) / (_DEVICE_FLOP_PER_S * speed)
