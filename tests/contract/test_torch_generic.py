"""torch's own generic optimizer tests, over the table that drives them.

`torch.testing._internal.common_optimizers`, which torch ships, describes an optimizer to its test
suite (`OptimizerInfo`): inputs, inputs that are errors, schedulers, what it supports. Here are such
descriptions of ours, and the generic tests of torch's `test/test_optim.py`, which it does not ship,
under the names they have there. What is not here is in test_torch_expectations, which says where.

Not supported, which is what the descriptions say by the defaults they change:

- `supported_impls` is empty: there are no `foreach`, `fused` and `differentiable` variants to
  compare, so that torch's tests of these (`test_foreach_*`, `test_fused_*`, `test_peak_memory_*`,
  `test_differentiable*`, `test_defaults_changed_to_foreach`) have no subject.
- `has_capturable_arg` is False: a step is not captured in CUDA graphs, because it decides on the
  host which refreshes are due (`test_capturable*`, `test_step_all_hooks` under capture).
- `supports_sparse` is False: a sparse gradient is a GradientError (`test_rosenbrock_sparse`; its
  function is minimized with dense gradients here).
- `supports_complex` is False: a complex parameter is a ConfigError (`test_complex*`).
- Tensors as `betas` are refused with a message of ours, as are tensors of several elements as `lr`.
- `test_step_is_noop_for_zero_grads`: weights do not move, but a step with gradients is counted, as
  torch's test allows for Adam and its family.
- `test_*_multigpu` and `test_state_dict_with_cuda_params` need devices.
"""

import copy
import io
import unittest
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.testing._internal.common_optimizers import (
    OptimizerErrorEnum,
    OptimizerInfo,
    OptimizerInput,
    TensorTracker,
    _get_optim_inputs_including_global_cliquey_kwargs,
)

from asteria import ConfigError, GradientError
from tests.support.optimizer_infos import CPU, INFOS

STEPS = 12


CASES = [
    pytest.param(info, case, id=f"{info.name}-{case.desc}")
    for info in INFOS
    for case in _get_optim_inputs_including_global_cliquey_kwargs(CPU, torch.float32, info)
]
over_infos = pytest.mark.parametrize("info", INFOS, ids=lambda info: info.name)
over_cases = pytest.mark.parametrize(("info", "case"), CASES)


def made(info: OptimizerInfo, params: Any, case: OptimizerInput, **kwargs: Any) -> Any:
    return info.optim_cls(params, **copy.deepcopy(case.kwargs), **kwargs)


def layer(contiguous: bool = True) -> tuple[nn.Parameter, nn.Parameter, Tensor]:
    """Weight, bias and input of a layer."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn((10, 5, 2), generator=generator)[..., 0]
    bias = torch.randn((10, 2), generator=generator)[..., 0]
    x = torch.randn(5, generator=generator)
    if contiguous:
        weight, bias = weight.contiguous(), bias.contiguous()
    return nn.Parameter(weight), nn.Parameter(bias), x


def closure_of(optimizer: Any, weight: Tensor, bias: Tensor, x: Tensor) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (weight.mv(x) + bias).pow(2).sum()
        loss.backward()
        return loss

    return closure


def in_right_direction(
    optimizer: Any, closure: Callable[[], Tensor], schedulers: list[Any], *, maximize: bool
) -> None:
    initial = closure().item()
    for _ in range(STEPS):
        for scheduler in schedulers:
            plateau = isinstance(scheduler, lr_scheduler.ReduceLROnPlateau)
            optimizer.step(closure)
            scheduler.step(*([closure().detach()] if plateau else []))
        if not schedulers:
            optimizer.step(closure)
    assert (closure().item() > initial) == maximize


@over_infos
def test_optim_infos_do_not_specify_global_cliquey_kwargs(info: OptimizerInfo) -> None:
    for case in info.optim_inputs_func(CPU):
        assert not {"foreach", "fused", "differentiable"} & case.kwargs.keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@over_infos
def test_errors(info: OptimizerInfo, dtype: torch.dtype) -> None:
    for wrong in info.optim_error_inputs_func(CPU, dtype):
        given = wrong.optimizer_error_input
        params = [nn.Parameter(torch.randn(4, 4))] if given.params is None else given.params
        assert wrong.error_on is OptimizerErrorEnum.CONSTRUCTION_ERROR
        if issubclass(wrong.error_type, Warning):
            with pytest.warns(wrong.error_type, match=wrong.error_regex):
                info.optim_cls(params, **given.kwargs)
            continue
        with pytest.raises(wrong.error_type, match=wrong.error_regex) as caught:
            info.optim_cls(params, **given.kwargs)
        assert given.params is not None or isinstance(caught.value, ConfigError), given.desc


@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "strided"])
@over_cases
def test_forloop_goes_right_direction(
    info: OptimizerInfo, case: OptimizerInput, contiguous: bool
) -> None:
    weight, bias, x = layer(contiguous)
    optimizer = made(info, [weight, bias], case)
    maximize = bool(case.kwargs.get("maximize"))
    closure = closure_of(optimizer, weight, bias, x)
    in_right_direction(optimizer, closure, [], maximize=maximize)


@pytest.mark.parametrize("number", range(len(INFOS[0].scheduler_inputs)))
@over_infos
def test_forloop_goes_right_direction_with_lrsched(info: OptimizerInfo, number: int) -> None:
    weight, bias, x = layer()
    optimizer = info.optim_cls([weight, bias])
    schedulers = [make(optimizer) for make in info.scheduler_inputs[number]]
    closure = closure_of(optimizer, weight, bias, x)
    in_right_direction(optimizer, closure, schedulers, maximize=False)


@pytest.mark.parametrize("number", range(len(INFOS[0].scheduler_inputs)))
@over_infos
def test_param_group_with_lrscheduler_goes_right_direction(
    info: OptimizerInfo, number: int
) -> None:
    weight, bias, x = layer()
    optimizer = info.optim_cls([{"params": [weight]}, {"params": [bias], "lr": 0.01}])
    schedulers = [make(optimizer) for make in info.scheduler_inputs[number]]
    closure = closure_of(optimizer, weight, bias, x)
    in_right_direction(optimizer, closure, schedulers, maximize=False)


class Exactly(unittest.TestCase):
    """What `TensorTracker` compares with."""

    def assertEqual(self, first: Any, second: Any, msg: Any = None) -> None:
        torch.testing.assert_close(first, second, rtol=0, atol=0)


@over_cases
def test_tensor_lr(info: OptimizerInfo, case: OptimizerInput) -> None:
    """The bits of every step are those of the same number, which float32 has."""
    tracker, runs = TensorTracker(), []
    for kind in (float, torch.tensor):
        weight, bias, x = layer()
        options = {**case.kwargs, "lr": kind(2.0**-7)}
        optimizer = info.optim_cls([weight, bias], **options)
        runs.append((optimizer, weight, bias, closure_of(optimizer, weight, bias, x)))
    (numbers, *own, closure), (tensors, *others, other_closure) = runs
    for _ in range(STEPS):
        numbers.step(closure)
        tensors.step(other_closure)
        for ours in own:
            tracker.add(ours)
        for theirs in others:
            tracker.pop_check_set(theirs, Exactly())
    assert tracker.all_popped()
    assert isinstance(tensors.param_groups[0]["lr"], Tensor)


@over_infos
def test_param_groups_lr(info: OptimizerInfo) -> None:
    """A rate of 0 leaves the first parameter and the second group where they are."""
    (weight, bias, x), (still, _, _) = layer(), layer()
    groups = [{"params": [weight], "lr": 0.01}, {"params": [still]}, {"params": [bias]}]
    optimizer = info.optim_cls(groups, lr=0.0)
    before = [p.detach().clone() for p in (still, bias)]
    closure = closure_of(optimizer, weight, bias, x)

    def both() -> Tensor:
        loss = closure()
        still.grad = torch.randn_like(still)
        return loss

    in_right_direction(optimizer, both, [], maximize=False)
    assert torch.equal(still, before[0])
    assert torch.equal(bias, before[1])


@over_infos
def test_param_groups_weight_decay(info: OptimizerInfo) -> None:
    weight, bias, x = layer()
    groups = [{"params": [weight], "weight_decay": 0.0, "lr": 0.01}, {"params": [bias]}]
    optimizer = info.optim_cls(groups, lr=0.1, weight_decay=0.1)
    in_right_direction(optimizer, closure_of(optimizer, weight, bias, x), [], maximize=False)


@over_cases
def test_step_is_noop_when_params_have_no_grad(info: OptimizerInfo, case: OptimizerInput) -> None:
    params = [*layer()[:2]]
    before = [p.detach().clone() for p in params]
    optimizer = made(info, params, case)
    optimizer.step()
    assert all(map(torch.equal, params, before))
    assert not optimizer.state


@over_cases
def test_step_is_noop_for_zero_grads(info: OptimizerInfo, case: OptimizerInput) -> None:
    params = [*layer()[:2]]
    before = [p.detach().clone() for p in params]
    still = OptimizerInput(None, {**case.kwargs, "weight_decay": 0.0})
    optimizer = made(info, params, still)
    for _ in range(5):
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert all(map(torch.equal, params, before))
    # The first gradient of a matrix makes its bases.
    assert [int(optimizer.state[p]["step"]) for p in params] == [4, 5]


@over_cases
def test_optimizer_can_be_printed(info: OptimizerInfo, case: OptimizerInput) -> None:
    optimizer = made(info, [*layer()[:2]], case)
    assert f"{optimizer!r}".startswith(info.name)


NAMINGS = [(False, False), (True, False), (False, True), (True, True)]


@pytest.mark.parametrize("named", NAMINGS, ids=str)
@over_cases
def test_state_dict_deterministic(
    info: OptimizerInfo, case: OptimizerInput, named: tuple[bool, bool]
) -> None:
    """Loading leaves the dict as it was, and equal runs have equal dicts."""
    optimizers, closures, weights = [], [], []
    for with_names in named:
        weight, bias, x = layer()
        params: Any = [("weight", weight), ("bias", bias)] if with_names else [weight, bias]
        optimizers.append(made(info, params, case))
        closures.append(closure_of(optimizers[-1], weight, bias, x))
        weights.append((weight, bias))
    one, two = optimizers
    for _ in range(STEPS):
        one.step(closures[0])
    with torch.no_grad():
        for theirs, ours in zip(weights[1], weights[0], strict=True):
            theirs.copy_(ours)
    saved, kept = copy.deepcopy(one.state_dict()), copy.deepcopy(one.state_dict())
    two.load_state_dict(saved)
    for _ in range(STEPS):
        one.step(closures[0])
        two.step(closures[1])
        assert all(map(torch.equal, weights[0], weights[1]))
    assert_equal(saved, kept)
    assert_equal(*(without_names(each.state_dict()) for each in (one, two)))


def without_names(state: dict[str, Any]) -> dict[str, Any]:
    groups = [{k: v for k, v in g.items() if k != "param_names"} for g in state["param_groups"]]
    return {**state, "param_groups": groups}


def assert_equal(first: Any, second: Any) -> None:
    if isinstance(first, Tensor):
        assert torch.equal(first, second)
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_equal(first[key], second[key])
    elif isinstance(first, list | tuple):
        for pair in zip(first, second, strict=True):
            assert_equal(*pair)
    else:
        assert first == second


@over_cases
def test_can_load_older_state_dict(info: OptimizerInfo, case: OptimizerInput) -> None:
    """One that lacks options which came later, and has the step as a number."""
    weight, bias, x = layer()
    optimizer = made(info, [weight, bias], case)
    closure = closure_of(optimizer, weight, bias, x)
    for _ in range(3):
        optimizer.step(closure)
    older = copy.deepcopy(optimizer.state_dict())
    for flag in info.not_og_supported_flags:
        for group in older["param_groups"]:
            group.pop(flag, None)
    for entries in older["state"].values():
        entries["step"] = entries["step"].item()
    steps = [entries["step"] for entries in older["state"].values()]
    optimizer.load_state_dict(older)
    optimizer.step(closure)
    found = [entries["step"] for entries in optimizer.state.values()]
    assert found == [count + 1 for count in steps]
    for flag in info.not_og_supported_flags:
        default = info.optim_cls([nn.Parameter(torch.zeros(2))]).defaults
        assert optimizer.param_groups[0].get(flag) == (default | case.kwargs).get(flag)


@over_cases
def test_save_load_equality_with_weights_only(info: OptimizerInfo, case: OptimizerInput) -> None:
    weight, bias, x = layer()
    optimizer = made(info, [weight, bias], case)
    closure = closure_of(optimizer, weight, bias, x)
    for _ in range(3):
        optimizer.step(closure)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    assert_equal(torch.load(file, weights_only=True), optimizer.state_dict())


@over_infos
def test_deepcopy_copies_all_public_attrs(info: OptimizerInfo) -> None:
    optimizer = info.optim_cls([*layer()[:2]])
    optimizer.mine = 1
    twin = copy.deepcopy(optimizer)

    def public(one: Any) -> set[str]:
        return {key for key in one.__dict__ if not key.startswith("_")}

    # torch pickles and copies three of them, and so do we.
    assert public(twin) == public(optimizer) - {"mine"}


@over_cases
def test_non_empty_state(info: OptimizerInfo, case: OptimizerInput) -> None:
    weight, bias, x = layer()
    optimizer = made(info, [weight, bias], case)
    optimizer.step(closure_of(optimizer, weight, bias, x))
    for entries in optimizer.state.values():
        assert {"step", "exp_avg"} <= {key.partition(".")[0] for key in entries}
        assert all(isinstance(value, Tensor) for value in entries.values())


def rosenbrock(point: Tensor) -> Tensor:
    x, y = point
    return (1 - x) ** 2 + 100 * (y - x**2) ** 2


@over_infos
def test_rosenbrock(info: OptimizerInfo) -> None:
    point = nn.Parameter(torch.tensor([1.5, 1.5]))
    optimizer = info.optim_cls([point], lr=0.02)
    solution = torch.tensor([1.0, 1.0])
    before = point.detach().dist(solution)
    for _ in range(200):
        optimizer.zero_grad()
        rosenbrock(point).backward()
        optimizer.step()
    assert point.detach().dist(solution) < before


@over_infos
def test_what_is_not_supported_is_refused(info: OptimizerInfo) -> None:
    with pytest.raises(ConfigError, match="complex"):
        info.optim_cls([nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64))])
    for flag in ("foreach", "fused", "differentiable", "capturable"):
        with pytest.raises(TypeError, match=flag):
            info.optim_cls([nn.Parameter(torch.zeros(2, 2))], **{flag: True})
    sparse = nn.Parameter(torch.zeros(2, 2))
    sparse.grad = torch.eye(2).to_sparse()
    with pytest.raises(GradientError, match="sparse"):
        info.optim_cls([sparse]).step()
