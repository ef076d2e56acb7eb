"""Stochastic rounding of float32 to bfloat16."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["stochastic_round"]


def stochastic_round(x: Tensor, generator: torch.Generator) -> Tensor:
    """Round to one of the two neighbouring bfloat16 values, so that the expectation is ``x``.

    bfloat16 is the upper half of a float32: adding a uniform 16-bit number to the bits and cutting
    the lower half off rounds away from zero with the probability of the cut part.
    Shapes: x float32 of any shape -> bfloat16 of the same shape. Allocates, never mutates. Infinite
    and nan values come back as they are. The generator is of x's device.
    """
    noise = torch.randint(
        0, 1 << 16, x.shape, dtype=torch.int32, device=x.device, generator=generator
    )
    bits = x.contiguous().view(torch.int32)
    rounded = (bits + noise).bitwise_and_(-(1 << 16)).view(torch.float32)
    return torch.where(torch.isfinite(x), rounded, x).to(torch.bfloat16)
