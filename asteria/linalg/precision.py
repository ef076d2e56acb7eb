"""Which products torch may round, and how the others are kept exact.

Where settings of the whole process allow it (``torch.set_float32_matmul_precision`` and what is
under ``torch.backends``), torch rounds the inputs of float32 products to TF32 on accelerators and
to bfloat16 on some CPUs. Other threads multiply at the same time, so only the owner of the process
may touch such a setting, and nothing here does. What must not be rounded goes through `exact_bmm`,
which looks at the setting and, where it allows rounding, leaves nothing that could be rounded.

| product | rounded | why |
|---|---|---|
| L Q and Q^T (L Q) of a refresh | never | eigenvalues below the rounding of the largest get lost |
| A^T A before a Cholesky factorization | never | its rounding is lack of orthogonality |
| Q^T Q z, the check of a new basis | never | it would find the rounding |
| Q^T (Q' - Q), by which a factor in its basis turns | never | as for L Q |
| Q (M - I), the correction in a refresh | where allowed | is orthonormalized afterwards |
| U^T B U - B, the turn of such a factor | where allowed | is relative to its row and column |
| projections and X X^T of gradients | where allowed | so are the products that gave the gradients |

Autocast is another matter: it would change the dtype of results, so a step turns it off.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.amp.autocast_mode import is_autocast_available

__all__ = ["exact_bmm", "without_autocast"]

_DROPPED_BITS = 13
"""Of a float32's 24, by TF32."""
_EXACT = ("ieee", "none", "highest")
"""Settings that allow no rounding."""


def exact_bmm(first: Tensor, second: Tensor) -> Tensor:
    """``torch.bmm`` whose inputs are not rounded, whatever torch is allowed to do.

    Shapes: (b, m, k) and (b, k, n) of one dtype -> (b, m, n). Allocates, never mutates; any thread;
    no synchronization with the device. Where rounding is allowed the host multiplies in float64;
    an accelerator multiplies parts of the inputs, three products of what TF32 holds to 2^-23, which
    takes tensor cores less than one float32 product takes without them. Not for use under autocast.
    """
    if first.dtype != torch.float32 or not _may_round(first.device):
        return torch.bmm(first, second)
    if first.is_cpu:
        return torch.bmm(first.double(), second.double()).float()
    (high, low), (other_high, other_low) = _parts(first), _parts(second)
    left = torch.cat([high, high, low], dim=-1)
    return torch.bmm(left, torch.cat([other_high, other_low, other_high], dim=-2))


def _parts(x: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest TF32, and the rest, of which TF32 drops at most one bit."""
    bits, half = x.contiguous().view(torch.int32), 1 << (_DROPPED_BITS - 1)
    high = (bits + half).bitwise_and_(-(1 << _DROPPED_BITS)).view(torch.float32)
    return high, x - high


def _may_round(device: torch.device) -> bool:
    """Whether torch may round the inputs of float32 products on ``device``."""
    if device.type == "cpu":
        setting = _setting(torch.backends.mkldnn)
        return setting not in _EXACT and _host_rounds(setting)
    # Intel's accelerators go by the host's setting.
    others = [] if device.type == "cuda" else [torch.backends.mkldnn]
    return any(_setting(backend) not in _EXACT for backend in (torch.backends.cuda, *others))


def _setting(backend: Any) -> str:
    """What a backend's products may do with float32."""
    # Since torch 2.9 there are settings by backend, and the old one fails where both were used.
    found: str | None = getattr(getattr(backend, "matmul", None), "fp32_precision", None)
    return torch.get_float32_matmul_precision() if found is None else found


@functools.cache
def _host_rounds(setting: str) -> bool:
    """Whether this processor makes use of the permission, which is in force."""
    # Whatever defaults somebody has set.
    beside_one = torch.full((1, 128, 128), 1 + 2.0**-20, dtype=torch.float32, device="cpu")
    return not bool((torch.bmm(beside_one, beside_one) > 128).all())


def without_autocast(devices: Iterable[torch.device]) -> AbstractContextManager[object]:
    """Autocast is off, for the calling thread, on the host and where ``devices`` are."""
    kinds = {"cpu", *(device.type for device in devices)}
    enabled = [k for k in kinds if is_autocast_available(k) and torch.is_autocast_enabled(k)]
    if not enabled:
        return nullcontext()
    stack = ExitStack()
    for kind in enabled:
        stack.enter_context(torch.autocast(kind, enabled=False))
    return stack
