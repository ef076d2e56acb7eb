"""Replaying recorded gradients through asteria and through the float64 references.

Options are given under the published names everywhere; only :func:`asteria_options` translates.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

import asteria
from tests.reference import ReferenceKLShampoo, ReferenceKLSOAP, ReferenceSOAP
from tests.reference.soap import Array

TOLERANCES = {
    "asteria float32, published float32": 2e-3,
    "reference float64, published float32": 2e-4,
    "asteria float64, reference float64": 1e-9,
}
"""Largest difference allowed at any step, in units of the parameter's largest movement."""

ASTERIA = {"SOAP": asteria.SOAP, "KL-Shampoo": asteria.KLShampoo, "KL-SOAP": asteria.KLSOAP}
REFERENCE = {
    "SOAP": ReferenceSOAP,
    "KL-Shampoo": ReferenceKLShampoo,
    "KL-SOAP": ReferenceKLSOAP,
}

Gradients = Array | Sequence[Array | None]
"""One parameter's, (steps, *shape) or one for each step; None where there was none."""

PUBLISHED_DEFAULTS: dict[str, Any] = {
    "shampoo_beta": -1,
    "eps": 1e-8,
    "weight_decay": 0.01,
    "precondition_frequency": 10,
    "normalize_grads": False,
}
PUBLISHED_SOAP: dict[str, Any] = PUBLISHED_DEFAULTS | {
    "lr": 3e-3,
    "betas": (0.95, 0.95),
    "max_precond_dim": 10000,
    "merge_dims": False,
    "precondition_1d": False,
    "data_format": "channels_first",
    "correct_bias": True,
}
PUBLISHED_KL: dict[str, Any] = PUBLISHED_DEFAULTS | {
    "lr": 1e-4,
    "betas": (0.9, 0.98),
    "init_factor": 0.1,
    "using_damping": False,
    "using_clamping": True,
    "max_clamp_value": 4000,
}


def asteria_options(optimizer: str, published: Mapping[str, Any]) -> dict[str, Any]:
    """Every published option, given or default, under asteria's names; asteria's own defaults may
    differ from the published ones, so none is left out.
    """
    options = (PUBLISHED_SOAP if optimizer == "SOAP" else PUBLISHED_KL) | dict(published)
    options["betas"] = tuple(options["betas"])
    if options["shampoo_beta"] < 0:
        options["shampoo_beta"] = None
    if optimizer != "SOAP":
        options["damp_factors"] = options.pop("using_damping")
        bound = options.pop("max_clamp_value")
        options["max_inverse_root"] = bound if options.pop("using_clamping") else None
        options.pop("cast_dtype", None)
        options.pop("using_klsoap", None)
    return options


def replay_asteria(
    optimizer: str,
    published: Mapping[str, Any],
    starts: Sequence[Array],
    gradients: Sequence[Gradients],
    dtype: torch.dtype,
    batch_dims: int = 0,
) -> list[Array]:
    """Trajectories (steps, *shape) of parameters that share one optimizer in reference mode."""
    parameters = [torch.nn.Parameter(torch.tensor(start, dtype=dtype)) for start in starts]
    options = asteria_options(optimizer, published)
    runtime = asteria.RuntimeConfig.reference()
    group = {"params": parameters, "batch_dims": batch_dims}
    stepper = ASTERIA[optimizer]([group], **options, runtime=runtime)
    history: list[list[Array]] = [[] for _ in parameters]
    for step in range(len(gradients[0])):
        for parameter, given in zip(parameters, gradients, strict=True):
            gradient = given[step]
            parameter.grad = None if gradient is None else torch.tensor(gradient, dtype=dtype)
        stepper.step()
        for past, parameter in zip(history, parameters, strict=True):
            past.append(parameter.detach().to(torch.float64).numpy().copy())
    return [np.stack(past) for past in history]


def replay_reference(
    optimizer: str,
    published: Mapping[str, Any],
    start: Array,
    gradients: Gradients,
) -> Array:
    """Trajectory (steps, *shape) of one parameter under the float64 reference."""
    dropped = ("cast_dtype", "using_klsoap")
    options = {name: value for name, value in published.items() if name not in dropped}
    reference = REFERENCE[optimizer](start, **options)
    current = np.asarray(start, dtype=np.float64)
    history = []
    for gradient in gradients:
        if gradient is not None:
            current = reference.step(gradient)
        history.append(current)
    return np.stack(history)


def assert_follows(actual: Array, expected: Array, start: Array, tolerance: str) -> None:
    """Both trajectories (steps, *shape) agree at every step, relative to the largest movement."""
    movement = np.abs(expected - start).max()
    assert movement > 0
    error = np.abs(actual - expected).reshape(len(expected), -1).max(axis=1) / movement
    first = int(np.argmax(~(error <= TOLERANCES[tolerance])))
    assert error[first] <= TOLERANCES[tolerance], (
        f"step {first + 1} is off by {error[first]:.1e} of the movement, "
        f"the worst step by {np.max(error):.1e}; allowed {TOLERANCES[tolerance]:.0e}"
    )
