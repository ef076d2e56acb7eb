"""Hyperparameters of a parameter group: what may be given, and the record a step works with."""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from asteria.config.refresh_plan import KEY, is_plan_text
from asteria.errors import ConfigError

__all__ = ["DECIDED", "FIRST_PERIOD", "Hyperparameters", "check_group", "check_keys"]

FIRST_PERIOD = 10
"""``precondition_frequency="auto"`` means this many steps until it has become a number."""

DECIDED = {"young_stride": 1, KEY: ""}
"""Options that a run decides on by itself, which stay in the group then, as they begin."""

# Written into groups by torch, by its schedulers and by training frameworks; not ours to judge.
_FOREIGN_KEYS = frozenset(
    {
        "params",
        "param_names",
        "name",
        "group_name",
        "initial_lr",
        "max_lr",
        "min_lr",
        "max_momentum",
        "base_momentum",
        "swa_lr",
        "lr_scale",
        "lr_mult",
    }
)

# Options that have no default: a group without one follows the RuntimeConfig.
_GROUPS_OWN = frozenset({"shards"})


def _is_number(value: object) -> bool:
    if type(value) is float:  # as nearly all are, at every step
        return math.isfinite(value)
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an int above the largest float
        return False


def _is_count(value: object) -> bool:
    if type(value) is int:
        return value >= 1
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        return False
    return int(value) >= 1


def _is_any_lr(value: object) -> bool:
    if isinstance(value, torch.Tensor):
        scalar = value.numel() == 1 and value.device.type == "cpu" and not value.is_complex()
        return scalar and _is_number(value.item())
    return _is_number(value)


def _is_lr(value: object) -> bool:
    return _is_any_lr(value) and value >= 0  # type: ignore[operator]


def _is_decay(value: object) -> bool:
    return _is_number(value) and 0 <= value < 1  # type: ignore[operator]


def _is_betas(value: object) -> bool:
    return isinstance(value, tuple | list) and len(value) == 2 and all(map(_is_decay, value))


def _is_positive(value: object) -> bool:
    return _is_number(value) and value > 0  # type: ignore[operator]


def _is_non_negative(value: object) -> bool:
    return _is_number(value) and value >= 0  # type: ignore[operator]


def _optional(check: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: value is None or check(value)


def _one_of(*options: str) -> tuple[Callable[[object], bool], str]:
    return lambda value: value in options, "one of " + ", ".join(map(repr, options))


_FLAG = (lambda value: isinstance(value, bool), "True or False")

# Option -> (check, what it must be).
_CHECKS: dict[str, tuple[Callable[[object], bool], str]] = {
    "lr": (_is_lr, "a number >= 0, or a one-element tensor of one on the CPU"),
    "betas": (_is_betas, "two numbers in [0, 1)"),
    "shampoo_beta": (_optional(_is_decay), "None (betas[1]) or a number in [0, 1)"),
    "eps": (_is_non_negative, "a number >= 0"),
    "weight_decay": (_is_non_negative, "a number >= 0"),
    "precondition_frequency": (
        lambda value: value == "auto" or _is_count(value),
        'an int >= 1 (steps), or "auto"',
    ),
    "young_stride": (_is_count, "an int >= 1 (young refreshes)"),
    KEY: (is_plan_text, "a text such as '768x768 device ldlr; 512x512 host qr every 20'"),
    "max_precond_dim": (_is_count, "an int >= 1"),
    "merge_dims": _FLAG,
    "precondition_1d": _FLAG,
    "normalize_grads": _FLAG,
    "correct_bias": _FLAG,
    "large_dims": _one_of("one_sided", "blocks"),
    "data_format": _one_of("channels_first", "channels_last"),
    "stochastic_rounding": _FLAG,
    "maximize": _FLAG,
    "init_factor": (_optional(_is_positive), "None (taken from the gradient) or a number > 0"),
    "damp_factors": _FLAG,
    "max_inverse_root": (_optional(_is_positive), "None (no clamping) or a number > 0"),
    "shards": _one_of("exact", "local"),
    "batch_dims": (
        lambda value: value is None or value == 0 or _is_count(value),
        "None (found out from the shape) or an int >= 0",
    ),
}


def check_keys(group: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    """Refuse a key of ``group`` that is no option and nothing that frameworks put there.

    Raises ConfigError that names the key and the nearest option.
    """
    options = sorted({*known, *_GROUPS_OWN})
    for key in group:
        if key in _FOREIGN_KEYS or key in options or str(key).startswith("_"):
            continue
        near = difflib.get_close_matches(str(key), options, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(
            f"{where}: unknown option {key!r}; {hint}Options are {', '.join(options)}; "
            "data of your own goes under 'name' or a key that starts with an underscore"
        )


def check_group(group: Mapping[str, Any], where: str, *, scheduled: bool = False) -> None:
    """Check the value of every option in ``group``; raises ConfigError for the first bad one.

    A ``scheduled`` learning rate may be negative: schedules round to a little below zero.
    """
    for key, (check, wanted) in _CHECKS.items():
        if scheduled and key == "lr":
            check, wanted = _is_any_lr, "a finite number"
        if key in group and not check(group[key]):
            raise ConfigError(f"{where}: {key} must be {wanted}, found {group[key]!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Hyperparameters:
    """What the mathematics of a block needs to know of its group in one step.

    Blocks with equal hyperparameters and equal step counters move through the products together,
    so the learning rate and the weight decay, which may differ by parameter, are not among them.
    """

    beta1: float
    beta2: float
    shampoo_beta: float
    """Decay of the Kronecker factors."""
    eps: float
    precondition_frequency: int
    normalize_grads: bool
    correct_bias: bool = True
    maximize: bool = False
    stochastic_rounding: bool = False
    init_factor: float | None = None
    damp_factors: bool = False
    max_inverse_root: float | None = None
    young_stride: int = 1
    """Of the early refreshes of ``start="fresh"`` every n-th takes place."""
    refresh_plan: str = ""
    """As `read_plan` reads it."""

    @classmethod
    def of(cls, group: Mapping[str, Any]) -> Hyperparameters:
        """Read them from a parameter group, as it is at this step."""
        beta1, beta2 = map(float, group["betas"])
        shampoo_beta = group["shampoo_beta"]
        period = group["precondition_frequency"]
        return cls(
            beta1=beta1,
            beta2=beta2,
            shampoo_beta=beta2 if shampoo_beta is None else shampoo_beta,
            eps=group["eps"],
            precondition_frequency=FIRST_PERIOD if period == "auto" else period,
            young_stride=group.get("young_stride", 1),
            refresh_plan=group.get(KEY, ""),
            normalize_grads=group["normalize_grads"],
            correct_bias=group.get("correct_bias", True),
            maximize=group["maximize"],
            stochastic_rounding=group["stochastic_rounding"],
            init_factor=group.get("init_factor"),
            damp_factors=group.get("damp_factors", False),
            max_inverse_root=group.get("max_inverse_root"),
        )
