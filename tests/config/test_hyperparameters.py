"""Options of a parameter group: every value checked, every unknown key refused."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch

from asteria.config.hyperparameters import Hyperparameters, check_group, check_keys
from asteria.errors import ConfigError

SOAP_OPTIONS = [
    "lr",
    "betas",
    "shampoo_beta",
    "eps",
    "weight_decay",
    "precondition_frequency",
    "max_precond_dim",
    "merge_dims",
    "large_dims",
]

VALID: dict[str, list[Any]] = {
    "lr": [
        0,
        0.0,
        1e-3,
        5,
        torch.tensor(0.1),
        torch.tensor([0.1]),
        torch.tensor(3),
        np.float32(0.1),
    ],
    "betas": [(0.9, 0.99), [0, 0.5], (0.0, 0.0)],
    "shampoo_beta": [None, 0, 0.999],
    "eps": [0, 0.0, 1e-8, 1],
    "weight_decay": [0, 0.01, 2],
    "precondition_frequency": [1, 100, np.int64(7)],
    "max_precond_dim": [1, 10000],
    "merge_dims": [True, False],
    "precondition_1d": [True, False],
    "normalize_grads": [True, False],
    "correct_bias": [True, False],
    "large_dims": ["one_sided", "blocks"],
    "data_format": ["channels_first", "channels_last"],
    "stochastic_rounding": [True, False],
    "maximize": [True, False],
    "init_factor": [None, 0.1, 3],
    "damp_factors": [True, False],
    "max_inverse_root": [None, 4000, 0.5],
    "batch_dims": [None, 0, 1, 3],
    "young_stride": [1, 3],
    "refresh_plan": ["", "measuring", "4x4 host qr; 3x5x7 device ldlr every 3"],
}

_NUMBERS = [-1, -0.1, math.inf, math.nan, "1", None, True]
_COUNTS = [0, -1, 1.0, "10", None, True]
_FLAGS = [0, 1, "yes", None]

INVALID: dict[str, list[Any]] = {
    "lr": [
        *_NUMBERS,
        torch.tensor(-1.0),
        torch.tensor(math.nan),
        torch.tensor([0.1, 0.1]),
        torch.tensor(1j),
        torch.tensor(True),
        np.float32("nan"),
        10**400,
    ],
    "betas": [0.9, (0.9,), (0.9, 0.9, 0.9), (1.0, 0.9), (0.9, 1), (-0.1, 0.9), ("a", 0.9), None],
    "shampoo_beta": [1, 1.0, -0.5, math.nan, "x", True],
    "eps": _NUMBERS,
    "weight_decay": _NUMBERS,
    "precondition_frequency": _COUNTS,
    "max_precond_dim": _COUNTS,
    "merge_dims": _FLAGS,
    "precondition_1d": _FLAGS,
    "normalize_grads": _FLAGS,
    "correct_bias": _FLAGS,
    "large_dims": ["both", None, True, ["blocks"]],
    "data_format": ["NCHW", None, 1],
    "stochastic_rounding": _FLAGS,
    "maximize": _FLAGS,
    "init_factor": [0, -1, math.inf, "x", True],
    "damp_factors": _FLAGS,
    "max_inverse_root": [0, -4, math.nan, "x", True],
    "batch_dims": [-1, 1.0, "1", True],
    "young_stride": [0, 1.0, "1", True, None],
    "refresh_plan": [None, "x", "4x4 host", "4x4 host qr;4x4 host qr", "4x4 device eigh"],
}

FOREIGN = [
    "params",
    "param_names",
    "name",
    "initial_lr",
    "max_lr",
    "min_lr",
    "max_momentum",
    "base_momentum",
    "swa_lr",
    "lr_scale",
    "_mine",
]


def cases(table: dict[str, list[Any]]) -> list[Any]:
    return [
        pytest.param(key, value, id=f"{key}-{number}")
        for key, values in table.items()
        for number, value in enumerate(values)
    ]


@pytest.mark.parametrize(("key", "value"), cases(VALID))
def test_a_value_in_range_is_accepted(key: str, value: Any) -> None:
    check_group({key: value}, "here")


@pytest.mark.parametrize(("key", "value"), cases(INVALID))
def test_a_value_out_of_range_is_refused_by_name(key: str, value: Any) -> None:
    with pytest.raises(ConfigError) as raised:
        check_group({**{k: v[0] for k, v in VALID.items()}, key: value}, "group 3")
    message = str(raised.value)
    assert message.startswith(f"group 3: {key} must be "), message
    assert message.endswith(f"found {value!r}"), message


@pytest.mark.parametrize("value", [-1e-12, torch.tensor(-1e-9), 0, 0.1])
def test_a_schedule_may_round_the_learning_rate_below_zero(value: Any) -> None:
    check_group({"lr": value}, "here", scheduled=True)


@pytest.mark.parametrize("value", [math.nan, -math.inf, torch.tensor(math.nan), "1", True, None])
def test_a_scheduled_learning_rate_is_a_finite_number(value: Any) -> None:
    with pytest.raises(ConfigError, match="here: lr must be a finite number, found"):
        check_group({"lr": value}, "here", scheduled=True)


def test_a_schedule_excuses_nothing_else() -> None:
    with pytest.raises(ConfigError, match="weight_decay must be a number >= 0"):
        check_group({"lr": -1e-9, "weight_decay": -1e-9}, "here", scheduled=True)


@pytest.mark.parametrize(
    ("key", "wanted"),
    [
        ("large_dims", "one of 'one_sided', 'blocks'"),
        ("data_format", "one of 'channels_first', 'channels_last'"),
        ("betas", "two numbers in [0, 1)"),
        ("max_inverse_root", "None (no clamping) or a number > 0"),
        ("merge_dims", "True or False"),
    ],
)
def test_the_message_says_what_may_be_given(key: str, wanted: str) -> None:
    with pytest.raises(ConfigError) as raised:
        check_group({key: "?"}, "here")
    assert wanted in str(raised.value)


def test_both_tables_know_every_option() -> None:
    assert VALID.keys() == INVALID.keys()


def test_options_that_are_absent_are_not_missed() -> None:
    check_group({}, "here")
    check_group({"params": [], "lr": 0.1}, "here")


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("weigth_decay", "weight_decay"),
        ("weight-decay", "weight_decay"),
        ("beta", "betas"),
        ("large_dim", "large_dims"),
        ("precond_frequency", "precondition_frequency"),
    ],
)
def test_a_misspelt_option_gets_the_nearest_one(key: str, nearest: str) -> None:
    with pytest.raises(ConfigError) as raised:
        check_keys({"lr": 0.1, key: 0}, SOAP_OPTIONS, "group 1")
    message = str(raised.value)
    assert message.startswith(f"group 1: unknown option {key!r}; did you mean {nearest!r}? ")
    assert ", ".join(sorted(SOAP_OPTIONS)) in message


def test_an_option_unlike_all_others_gets_the_list() -> None:
    with pytest.raises(ConfigError) as raised:
        check_keys({"zzz": 0}, SOAP_OPTIONS, "group 0")
    message = str(raised.value)
    assert "did you mean" not in message
    assert ", ".join(sorted(SOAP_OPTIONS)) in message


@pytest.mark.parametrize("key", [*SOAP_OPTIONS, *FOREIGN])
def test_options_and_what_frameworks_put_into_groups_are_accepted(key: str) -> None:
    check_keys({key: object()}, SOAP_OPTIONS, "here")


def test_an_option_of_another_optimizer_is_unknown() -> None:
    with pytest.raises(ConfigError, match="unknown option 'init_factor'"):
        check_keys({"init_factor": 0.1}, SOAP_OPTIONS, "here")


GROUP: dict[str, Any] = {
    "lr": 0.1,
    "betas": (0.8, 0.9),
    "shampoo_beta": None,
    "eps": 1e-6,
    "weight_decay": 0.5,
    "precondition_frequency": 7,
    "normalize_grads": True,
    "maximize": True,
    "stochastic_rounding": True,
}


def test_the_record_of_a_group() -> None:
    hyper = Hyperparameters.of(GROUP)
    assert dataclasses.asdict(hyper) == {
        "beta1": 0.8,
        "beta2": 0.9,
        "shampoo_beta": 0.9,
        "eps": 1e-6,
        "precondition_frequency": 7,
        "normalize_grads": True,
        "correct_bias": True,
        "maximize": True,
        "stochastic_rounding": True,
        "init_factor": None,
        "damp_factors": False,
        "max_inverse_root": None,
        "young_stride": 1,
        "refresh_plan": "",
    }


def test_what_an_optimizer_does_not_offer_is_off() -> None:
    hyper = Hyperparameters(
        beta1=0.8,
        beta2=0.9,
        shampoo_beta=0.9,
        eps=1e-6,
        precondition_frequency=7,
        normalize_grads=True,
    )
    plain = {"maximize": False, "stochastic_rounding": False}
    assert hyper == Hyperparameters.of(GROUP | plain)


def test_what_a_group_gives_is_taken() -> None:
    given = {
        "shampoo_beta": 0.0,
        "correct_bias": False,
        "init_factor": 0.1,
        "damp_factors": True,
        "max_inverse_root": 4000,
    }
    hyper = Hyperparameters.of({**GROUP, **given})
    assert {key: getattr(hyper, key) for key in given} == given


def test_groups_that_differ_in_lr_only_have_equal_records() -> None:
    assert Hyperparameters.of(GROUP) == Hyperparameters.of({**GROUP, "lr": 9, "weight_decay": 0})
    assert Hyperparameters.of(GROUP) != Hyperparameters.of({**GROUP, "eps": 0.1})


def test_the_record_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Hyperparameters.of(GROUP).eps = 1.0  # type: ignore[misc]
