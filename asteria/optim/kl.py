"""`asteria.KLShampoo` and `asteria.KLSOAP`."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from asteria.algorithms.kl import KLSOAP as _KLSOAPRule
from asteria.algorithms.kl import KLShampoo as _KLShampooRule
from asteria.config.runtime import RuntimeConfig
from asteria.optim.optimizer import Parameters, SecondOrderOptimizer

__all__ = ["KLSOAP", "KLShampoo"]


class _KullbackLeibler(SecondOrderOptimizer):
    """The options that both optimizers share."""

    def __init__(
        self,
        params: Parameters,
        lr: float | Tensor = 3e-3,
        betas: tuple[float, float] = (0.9, 0.98),
        shampoo_beta: float | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        precondition_frequency: int | Literal["auto"] = 10,
        max_precond_dim: int = 10000,
        normalize_grads: bool = False,
        *,
        init_factor: float | None = None,
        damp_factors: bool = False,
        max_inverse_root: float | None = 4000,
        large_dims: Literal["one_sided", "blocks"] = "one_sided",
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
            "normalize_grads": normalize_grads,
            "init_factor": init_factor,
            "damp_factors": damp_factors,
            "max_inverse_root": max_inverse_root,
            "large_dims": large_dims,
            "stochastic_rounding": stochastic_rounding,
            "maximize": maximize,
        }
        super().__init__(params, defaults, runtime)


class KLShampoo(_KullbackLeibler):
    """KL-Shampoo: Shampoo whose factors minimize a Kullback-Leibler divergence.

    Each factor is estimated from gradients whitened by the others; momentum is preconditioned by
    the inverse square roots of all of them. It needs no second moment.

    Args:
        params: parameters, ``(name, parameter)`` pairs or groups, as in every torch optimizer. A
            group may override any option below up to ``maximize``, and may set ``batch_dims``:
            the number of leading dims that index independent blocks (stacks of experts). Its
            default None finds stacks by their shape: rank 3, the last two dims at least 32.
        lr: learning rate; a number, or a one-element tensor on the CPU.
        betas: decay of the momentum, and of the factors unless ``shampoo_beta`` is given.
        shampoo_beta: decay of the Kronecker factors; None takes ``betas[1]``.
        eps: added to the inverse of the preconditioner's eigenvalues.
        weight_decay: decoupled; applied after the update.
        precondition_frequency: steps between refreshes of the eigenbases; ``"auto"``: as few as the
            host sustains, from what the first steps have cost. Their eigenvalues are
            updated at every step.
        max_precond_dim: a dim above it has no eigenbasis; its eigenvalues act by index.
        normalize_grads: scale every update to a root mean square of 1.
        init_factor: first eigenvalue of every factor. None takes it from the first gradient, so
            that nothing depends on the gradient's scale; a number is the published behaviour
            (there 0.1).
        damp_factors: damp the factors' eigenvalues by ``eps`` (published as ``using_damping``).
        max_inverse_root: bound on the inverse roots of the eigenvalues: max(10, min(n, bound)) for
            a factor of size n; relative to the gradient's scale if ``init_factor`` is None. None
            is no bound.
        large_dims: ``"one_sided"``, or ``"blocks"``: dims above ``max_precond_dim`` are cut into
            tiles.
        stochastic_rounding: round bfloat16 weights up or down at random, so that updates below
            their resolution act on average. Other dtypes are not affected.
        maximize: ascend instead of descend.
        runtime: how the work is done; None takes ``RuntimeConfig()``.

    Tensors of any rank have one factor per dim; those with fewer than two dims above 1 take the
    AdamW rule. Raises ConfigError for an option or parameter that cannot be used.

    Source: Lin et al., Understanding and Improving Shampoo and SOAP via Kullback-Leibler
    Minimization (arXiv 2509.03378). With ``RuntimeConfig.reference()`` and ``init_factor=0.1`` it
    follows the authors' implementation.
    """

    rule = _KLShampooRule()


class KLSOAP(_KullbackLeibler):
    """KL-SOAP: Adam, without bias correction, in the eigenbases of KL-Shampoo's factors.

    Arguments, errors and source as in `KLShampoo`; ``betas[1]`` also decays the second moment.
    """

    rule = _KLSOAPRule()
