"""Adam's moments and update, in whatever basis the gradient comes, and the AdamW rule."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from asteria.algorithms.algorithm import Algorithm, BlockShape, BlockState, Contribution, Pair
from asteria.config.hyperparameters import Hyperparameters
from asteria.config.runtime import Factors
from asteria.linalg.deferred import do
from asteria.linalg.modes import replace_
from asteria.store.layout import FieldSpec

__all__ = ["AdamW", "adam_update_", "bias_correction", "bound_ratio_", "ema_", "largest_ratio"]

_MANY_STEPS = torch.tensor(1e18, dtype=torch.float32, device="cpu")


def ema_(mean: Tensor, value: Tensor, beta: float, gate: Tensor | None) -> None:
    """``mean`` <- beta * mean + (1 - beta) * value, in place, unless ``gate`` is 0."""
    if gate is None:
        mean.lerp_(value, 1 - beta)
    else:
        mean.lerp_(value, gate * (1 - beta))


def adam_update_(
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    gradient: Tensor,
    hyper: Hyperparameters,
    *,
    out: Tensor,
    gate: Tensor | None,
) -> Tensor:
    """Advance both moments and write exp_avg / (sqrt(exp_avg_sq) + eps) to ``out``.

    All of one shape and dtype; ``out`` may be ``gradient``, which is then overwritten. The bias
    corrections are not in it.
    """
    if gate is None and out.device.type == "cpu":
        if out is not gradient:
            do(out.copy_, gradient)
        _fused_update_(exp_avg, exp_avg_sq, out, hyper)
        return out
    ema_(exp_avg, gradient, hyper.beta1, gate)
    if gate is None:
        exp_avg_sq.mul_(hyper.beta2).addcmul_(gradient, gradient, value=1 - hyper.beta2)
    else:
        ema_(exp_avg_sq, torch.mul(gradient, gradient, out=out), hyper.beta2, gate)
    torch.sqrt(exp_avg_sq, out=out).add_(hyper.eps)
    return torch.div(exp_avg, out, out=out)


def _fused_update_(
    exp_avg: Tensor, exp_avg_sq: Tensor, gradient: Tensor, hyper: Hyperparameters
) -> None:
    """The same in place of the gradient by PyTorch's fused AdamW kernel, in one pass.

    The gradient takes the place of the weights, too: with a learning rate and a weight decay of -1
    these decay to zero, and what is left is the update (where the gradient is not finite, it and
    the moments are lost anyway). After very many steps the update has no bias correction. The
    kernel is the one of ``torch.optim.AdamW(fused=True)``, on the CPU since 2.4.
    """
    do(
        torch._fused_adamw_,
        [gradient],
        [gradient],
        [exp_avg],
        [exp_avg_sq],
        [],
        [_MANY_STEPS],
        amsgrad=False,
        lr=-1.0,
        beta1=hyper.beta1,
        beta2=hyper.beta2,
        weight_decay=-1.0,
        eps=hyper.eps,
        maximize=False,
    )


def largest_ratio(hyper: Hyperparameters) -> float:
    """The largest |exp_avg| / sqrt(exp_avg_sq) that gradients can cause within one basis.

    By Cauchy-Schwarz (1 - beta1) / sqrt((1 - beta2) (1 - beta1^2 / beta2)), which is 1 for equal
    betas; 10 where that is larger, or infinite because beta1^2 >= beta2.
    """
    memory = 1 - hyper.beta1**2 / hyper.beta2 if hyper.beta2 > 0 else 0.0
    if memory <= 0:
        return 10.0
    return float(min(10.0, (1 - hyper.beta1) / ((1 - hyper.beta2) * memory) ** 0.5))


def bound_ratio_(
    exp_avg: Tensor, exp_avg_sq: Tensor, bound: float, *, out: Tensor, gate: Tensor | None
) -> None:
    """``exp_avg_sq`` <- max(exp_avg_sq, (exp_avg / bound)^2), in place, unless ``gate`` is 0.

    A rotation can turn the first moment into a direction whose second moment is all but zero, and
    the next update would be up to 1/eps times too large.
    """
    torch.mul(exp_avg, exp_avg, out=out).mul_(bound**-2)
    replace_(exp_avg_sq, torch.maximum(exp_avg_sq, out, out=out), gate)


def bias_correction(hyper: Hyperparameters, step: int) -> float:
    """sqrt(1 - beta2^t) / (1 - beta1^t), which corrects the update for moments begun at zero."""
    if not hyper.correct_bias:
        return 1.0
    return float((1 - hyper.beta2**step) ** 0.5 / (1 - hyper.beta1**step))


class AdamW:
    """AdamW (arXiv 1711.05101) with eps outside of the bias correction, as SOAP's authors have it.

    The blocks are single elements: gradients are (b,).
    """

    name = "adamw"
    has_bases = False
    squeezes = True
    sorts_columns = False
    bases_in: torch.dtype | None = None
    factors: Factors = "full"
    rows_alike = True
    in_bases = False
    can_defer = True

    def storing(self, bases_in: torch.dtype | None, factors: Factors) -> Algorithm:
        """The same rule: there are no eigenbases and no factors."""
        return self

    def fields(self, block: BlockShape) -> tuple[FieldSpec, ...]:
        """Two moments."""
        return FieldSpec("exp_avg", ()), FieldSpec("exp_avg_sq", ())

    def first_contributions(
        self, state: BlockState, gradient: Tensor, hyper: Hyperparameters
    ) -> Iterator[Contribution]:
        """None: there are no factors, and the moments begin at zero."""
        return iter(())

    def direction_(
        self,
        state: BlockState,
        gradient: Tensor,
        hyper: Hyperparameters,
        *,
        step: int,
        scratch: Pair,
        gate: Tensor | None,
    ) -> tuple[Tensor, float]:
        """The bias-corrected ratio of the moments."""
        update = adam_update_(
            state["exp_avg"], state["exp_avg_sq"], gradient, hyper, out=scratch[0], gate=gate
        )
        return update, self.scale(hyper, step)

    def scale(self, hyper: Hyperparameters, step: int) -> float:
        """The bias correction."""
        return bias_correction(hyper, step)

    def contributions(
        self,
        state: BlockState,
        gradient: Tensor,
        hyper: Hyperparameters,
        *,
        scratch: Pair,
        gate: Tensor | None,
    ) -> Iterator[Contribution]:
        """None: there are no factors."""
        return iter(())

    def contributed_tensors(self, block: BlockShape) -> int:
        """None."""
        return 0

    def rotate_(
        self,
        state: BlockState,
        fresh: list[Tensor | None],
        *,
        scratch: Pair,
        gate: Tensor | None,
        bound: float | None = None,
    ) -> None:
        """Nothing: there is no basis."""

    def project_moments_(self, state: BlockState, *, scratch: Pair, bound: float) -> None:
        """Nothing: the moments are in the parameter's space."""
