"""What parameters, gradients and loaded groups must be; refusals that name them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from asteria.config.hyperparameters import check_group, check_keys
from asteria.config.runtime import RuntimeConfig
from asteria.errors import ConfigError, GradientError

__all__ = [
    "check_dtype",
    "check_gradient",
    "check_parameter",
    "checked_runtime",
    "given_parameters",
    "group_problems",
]

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def checked_runtime(runtime: object) -> RuntimeConfig:
    """The settings that were given, by default the defaults; raises ConfigError for others."""
    if runtime is None:
        return RuntimeConfig()
    if not isinstance(runtime, RuntimeConfig):
        raise ConfigError(
            f"runtime must be an asteria.RuntimeConfig, found {type(runtime).__name__}"
        )
    return runtime


def given_parameters(optimizer: str, params: Any) -> Any:
    """What an optimizer was given, read once; raises ConfigError if it is empty."""
    given = params if isinstance(params, Tensor | set) else list(params)
    if isinstance(given, list) and not given:
        raise ConfigError(
            f"{optimizer} got an empty parameter list: pass model.parameters() of a model that has "
            "some, as a list if it is used twice"
        )
    return given


def check_parameter(name: str, parameter: Tensor) -> None:
    """Refuse what can never be trained, with a ConfigError; frozen parameters may be anything."""
    if parameter.is_complex():
        raise ConfigError(
            f"{name}: complex parameters are not supported, found {parameter.dtype}; "
            "train its real and imaginary part as two parameters (torch.view_as_real)"
        )
    if getattr(parameter, "_is_flat_param", False):
        raise ConfigError(
            f"{name}: FullyShardedDataParallel has flattened this parameter, so that the shapes of "
            "its matrices are gone; use fully_shard (FSDP2) or DDP"
        )
    if parameter.requires_grad:
        check_dtype(name, parameter)


def check_dtype(name: str, parameter: Tensor) -> None:
    """Refuse a dtype that cannot be trained, with a ConfigError."""
    if parameter.dtype not in _DTYPES:
        raise ConfigError(
            f"{name}: parameters must be float64, float32, bfloat16 or float16, found "
            f"{parameter.dtype}; convert it, or freeze it with requires_grad_(False)"
        )


def group_problems(groups: Iterable[Mapping[str, Any]], known: Iterable[str]) -> list[str]:
    """What is wrong with the options of loaded groups."""
    problems = []
    for number, group in enumerate(groups):
        try:
            check_keys(group, known, f"group {number}")
            check_group(group, f"group {number}", scheduled=True)
        except ConfigError as error:
            problems.append(str(error))
    return problems


def check_gradient(name: str, parameter: Tensor) -> None:
    """Refuse a gradient that is not dense, with a GradientError."""
    gradient = parameter.grad
    if gradient is not None and gradient.layout != torch.strided:
        raise GradientError(
            f"{name}: a dense gradient was needed, found one of layout {gradient.layout}; nothing "
            "was changed. Use nn.Embedding(..., sparse=False), or give this parameter to "
            "torch.optim.SparseAdam"
        )
