"""`asteria.SOAP`."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from asteria.algorithms.soap import SOAP as _Rule
from asteria.config.runtime import RuntimeConfig
from asteria.optim.optimizer import Parameters, SecondOrderOptimizer

__all__ = ["SOAP"]


class SOAP(SecondOrderOptimizer):
    """SOAP: Adam in the slowly changing eigenbasis of Shampoo's preconditioner.

    Args:
        params: parameters, ``(name, parameter)`` pairs or groups, as in every torch optimizer. A
            group may override any option below up to ``maximize``, and may set ``batch_dims``:
            the number of leading dims that index independent blocks (stacks of experts). Its
            default None finds stacks by their shape: rank 3, the last two dims at least 32.
        lr: learning rate; a number, or a one-element tensor on the CPU.
        betas: decay of the first and second moment.
        shampoo_beta: decay of the Kronecker factors; None takes ``betas[1]``.
        eps: added to the root of the second moment.
        weight_decay: decoupled; applied after the update.
        precondition_frequency: steps between refreshes of the eigenbases; ``"auto"``: as few as the
            host sustains, from what the first steps have cost.
        max_precond_dim: dims above it get no factor of their own (see ``large_dims``).
        merge_dims: merge neighbouring dims while their product is at most ``max_precond_dim``.
        precondition_1d: give vectors a factor instead of the AdamW rule.
        normalize_grads: scale every update to a root mean square of 1. Reported to help at
            precondition_frequency around 100 and to hurt around 10.
        correct_bias: bias correction of the moments.
        large_dims: ``"one_sided"``: a dim above ``max_precond_dim`` has no factor, the others of
            the parameter have; ``"blocks"``: it is cut into tiles that have.
        data_format: of convolution weights whose dims are merged: ``"channels_first"`` or
            ``"channels_last"`` (stored as out, height, width, in).
        stochastic_rounding: round bfloat16 weights up or down at random, so that updates below
            their resolution act on average. Other dtypes are not affected.
        maximize: ascend instead of descend.
        runtime: how the work is done; None takes ``RuntimeConfig()``.

    Raises ConfigError for an option or parameter that cannot be used.

    Source: Vyas et al., SOAP: Improving and Stabilizing Shampoo using Adam (arXiv 2409.11321).
    With ``RuntimeConfig.reference()`` it follows the authors' implementation.
    """

    rule = _Rule()

    def __init__(
        self,
        params: Parameters,
        lr: float | Tensor = 3e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        shampoo_beta: float | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        precondition_frequency: int | Literal["auto"] = 10,
        max_precond_dim: int = 10000,
        merge_dims: bool = False,
        precondition_1d: bool = False,
        normalize_grads: bool = False,
        correct_bias: bool = True,
        *,
        large_dims: Literal["one_sided", "blocks"] = "one_sided",
        data_format: Literal["channels_first", "channels_last"] = "channels_first",
        stochastic_rounding: bool = False,
        maximize: bool = False,
        runtime: RuntimeConfig | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "shampoo_beta": shampoo_beta,
            "eps": eps,
            "weight_decay": weight_decay,
            "precondition_frequency": precondition_frequency,
            "max_precond_dim": max_precond_dim,
            "merge_dims": merge_dims,
            "precondition_1d": precondition_1d,
            "normalize_grads": normalize_grads,
            "correct_bias": correct_bias,
            "large_dims": large_dims,
            "data_format": data_format,
            "stochastic_rounding": stochastic_rounding,
            "maximize": maximize,
        }
        super().__init__(params, defaults, runtime)
