"""What parameters, gradients and loaded groups must be."""

import pytest
import torch

from asteria.errors import ConfigError, GradientError
from asteria.optim.checks import check_dtype, check_gradient, check_parameter, group_problems

TRAINABLE = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
OPTIONS = ["lr", "betas", "eps", "weight_decay"]


def parameter(dtype: torch.dtype, *, trained: bool = True) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.zeros(3, dtype=dtype), requires_grad=trained)


@pytest.mark.parametrize("dtype", TRAINABLE)
def test_what_can_be_trained(dtype: torch.dtype) -> None:
    check_dtype("p", parameter(dtype))
    check_parameter("p", parameter(dtype))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_dtype_that_cannot_be_trained_is_refused_but_when_frozen(dtype: torch.dtype) -> None:
    for check in (check_dtype, check_parameter):
        with pytest.raises(ConfigError) as raised:
            check("layer.weight", parameter(dtype))
        message = str(raised.value)
        assert message.startswith("layer.weight: parameters must be float64, float32, bfloat16 or ")
        assert f"found {dtype}" in message
        assert "freeze it" in message
    check_parameter("layer.weight", parameter(dtype, trained=False))


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
def test_a_frozen_parameter_may_be_of_integers(dtype: torch.dtype) -> None:
    check_parameter("p", parameter(dtype, trained=False))


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_a_complex_parameter_is_refused_with_the_way_out(dtype: torch.dtype, trained: bool) -> None:
    with pytest.raises(ConfigError) as raised:
        check_parameter("layer.weight", parameter(dtype, trained=trained))
    message = str(raised.value)
    assert message.startswith("layer.weight: complex parameters are not supported, found ")
    assert str(dtype) in message
    assert "torch.view_as_real" in message


def test_a_parameter_that_fsdp_has_flattened_is_refused() -> None:
    flat = parameter(torch.float32)
    flat._is_flat_param = True
    with pytest.raises(ConfigError, match=r"^layer.weight: FullyShardedDataParallel has flattened"):
        check_parameter("layer.weight", flat)


def test_a_dense_gradient_or_none_passes() -> None:
    one = parameter(torch.float32)
    check_gradient("p", one)
    one.grad = torch.ones(3)
    check_gradient("p", one)


def test_a_sparse_gradient_is_refused_by_name() -> None:
    one = parameter(torch.float32)
    one.grad = torch.ones(3).to_sparse()
    with pytest.raises(GradientError) as raised:
        check_gradient("layer.weight", one)
    message = str(raised.value)
    assert message.startswith("layer.weight: a dense gradient was needed, found one of layout ")
    assert "torch.sparse_coo" in message
    assert "nothing was changed" in message


def test_every_bad_group_is_told_with_its_number() -> None:
    groups = [
        {"params": [0], "lr": 0.1},
        {"params": [1], "lr": 0.1, "weight_decai": 0.0},
        {"params": [2], "eps": -1.0},
        {"params": [3], "lr": -1e-12, "betas": (0.9, 0.9)},
    ]
    problems = group_problems(groups, OPTIONS)
    assert [problem.split(":")[0] for problem in problems] == ["group 1", "group 2"]
    assert "unknown option 'weight_decai'; did you mean 'weight_decay'?" in problems[0]
    assert "eps must be a number >= 0, found -1.0" in problems[1]
    assert group_problems([groups[0], groups[3]], OPTIONS) == []
