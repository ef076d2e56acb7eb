"""How near is near: every tolerance of the contract tests, keyed by what is compared and dtype."""

import torch

SAME_MATH = "the same arithmetic in another order or stacking"
OTHER_PRECISION = "the same run in float64"
OTHER_SCALE = "the same run with scaled gradients, eps aside"
GATED = "the same run gated on the device"
ON_AVERAGE = "the same run in float32, on average over the elements"
ADAM = "torch.optim.Adam, whose eps stands elsewhere"

# Relative to the largest movement of the tensor compared.
TOLERANCES: dict[tuple[str, torch.dtype], float] = {
    (SAME_MATH, torch.float64): 1e-9,
    (SAME_MATH, torch.float32): 1e-3,
    (OTHER_PRECISION, torch.float32): 1e-3,
    (OTHER_PRECISION, torch.bfloat16): 0.2,
    (OTHER_PRECISION, torch.float16): 0.03,
    (ON_AVERAGE, torch.bfloat16): 0.1,
    (OTHER_SCALE, torch.float64): 1e-5,
    (GATED, torch.float32): 1e-3,
    (ADAM, torch.float64): 1e-9,
}
