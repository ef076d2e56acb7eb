"""What cannot be used is refused at once, by a typed error that says what to change."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

from asteria import AsteriaError, ConfigError, GradientError, ParameterChangedError, RuntimeConfig
from tests.support.arms import OPTIMIZERS, Arm, over_alone_arms, over_arms, over_optimizers
from tests.support.tolerances import SAME_MATH
from tests.support.training import (
    SMALL,
    Bits,
    assert_near,
    assert_same_bits,
    clones,
    everything,
    parameters,
    set_gradients,
    train,
    weights,
)

NAN, INF = float("nan"), float("inf")
NO_NUMBERS = [None, "0.1", NAN, INF, -INF, 1j, True, [0.1]]
NO_FLAGS = [None, 0, 1, "yes"]
NO_COUNTS = [0, -1, 1.5, 10.0, "3", None, True, NAN]

# Option -> values out of its range.
OUT_OF_RANGE: dict[str, list[Any]] = {
    "lr": [*NO_NUMBERS, -1e-9, torch.tensor([0.1, 0.1]), torch.tensor(NAN), torch.tensor(-1.0)],
    "betas": [
        *[0.9, None, "ab", (0.9,), (0.9, 0.9, 0.9), (0.9, 1.0), (-0.1, 0.9), (NAN, 0.9)],
        *[(0.9, None), (True, 0.9)],
    ],
    "shampoo_beta": [1.0, -1, -0.1, NAN, "0.9", True],
    "eps": [*NO_NUMBERS, -1e-8],
    "weight_decay": [*NO_NUMBERS, -0.01],
    "precondition_frequency": NO_COUNTS,
    "max_precond_dim": NO_COUNTS,
    "batch_dims": [-1, 1.0, "1", True],
    "young_stride": [0, 1.0, "1", True, None],
    "refresh_plan": [None, 3, "host", "4x4 host", "4x4 moon qr", "4x4 host qr every 0", "4x4; "],
    "merge_dims": NO_FLAGS,
    "precondition_1d": NO_FLAGS,
    "normalize_grads": NO_FLAGS,
    "correct_bias": NO_FLAGS,
    "stochastic_rounding": NO_FLAGS,
    "maximize": NO_FLAGS,
    "damp_factors": NO_FLAGS,
    "large_dims": ["onesided", None, 1],
    "data_format": ["NCHW", None],
    "init_factor": [0, -0.1, INF, NAN, "auto"],
    "max_inverse_root": [0, -1, INF, NAN, "none"],
}


def options_of(name: str) -> list[str]:
    optimizer = OPTIMIZERS[name](parameters())
    return [key for key in optimizer.param_groups[0] if key not in ("params", "asteria")]


@over_optimizers
def test_every_option_is_in_the_table(name: str) -> None:
    assert set(options_of(name)) <= OUT_OF_RANGE.keys()


@over_optimizers
def test_hyperparameters_out_of_range(name: str) -> None:
    """In the constructor, in a group, in a group added later, and written into a group."""
    for option in options_of(name):
        for value in OUT_OF_RANGE[option]:
            where = rf"{option} must be .*found"
            if option not in ("batch_dims", "young_stride", "refresh_plan"):
                with pytest.raises(ConfigError, match=where):
                    OPTIMIZERS[name](parameters(), **{option: value})
            with pytest.raises(ConfigError, match=rf"group 0: {where}"):
                OPTIMIZERS[name]([{"params": parameters(), option: value}])
            optimizer = OPTIMIZERS[name](parameters())
            with pytest.raises(ConfigError, match=rf"group 1: {where}"):
                optimizer.add_param_group({"params": parameters(seed=1), option: value})
            assert len(optimizer.param_groups) == 1


@over_optimizers
def test_hyperparameters_written_out_of_range(name: str) -> None:
    """The next step refuses them and changes nothing; corrected, the run goes on."""
    optimizer = OPTIMIZERS[name](parameters())
    train(optimizer, range(2))
    before = everything(optimizer)
    (group,) = optimizer.param_groups
    # Schedules may compute lr a little below zero; routing options act on new parameters.
    for option in set(options_of(name)) - {"lr"}:
        kept = group[option]
        group[option] = OUT_OF_RANGE[option][0]
        set_gradients(group["params"], 2)
        with pytest.raises(ConfigError, match=option):
            optimizer.step()
        assert_same_bits(everything(optimizer), before)
        group[option] = kept
    group["lr"] = NAN
    with pytest.raises(ConfigError, match="lr"):
        optimizer.step()
    assert_same_bits(everything(optimizer), before)
    group["lr"] = 0.1
    train(optimizer, [2])


@over_optimizers
def test_numbers_of_any_kind_are_taken(name: str) -> None:
    """Ints, numpy's scalars and lists, as configuration files and schedules give them."""
    np = pytest.importorskip("numpy")
    optimizer = OPTIMIZERS[name](
        parameters(),
        lr=np.float32(0.5),
        betas=[np.float32(0.5), 0],
        eps=0,
        weight_decay=1,
        precondition_frequency=np.int64(2),
        max_precond_dim=np.int32(8),
    )
    plain = OPTIMIZERS[name](
        parameters(),
        lr=0.5,
        betas=(0.5, 0.0),
        eps=0.0,
        weight_decay=1.0,
        precondition_frequency=2,
        max_precond_dim=8,
    )
    train(optimizer, range(5))
    train(plain, range(5))
    assert_same_bits(everything(optimizer), everything(plain))


@over_optimizers
def test_unknown_options(name: str) -> None:
    with pytest.raises(TypeError, match="momentum"):
        OPTIMIZERS[name](parameters(), momentum=0.9)
    with pytest.raises(
        ConfigError, match="unknown option 'weight_decy'; did you mean 'weight_decay'"
    ):
        OPTIMIZERS[name]([{"params": parameters(), "weight_decy": 0.1}])
    with pytest.raises(ConfigError, match="unknown option 'zzz'") as caught:
        OPTIMIZERS[name]([{"params": parameters(), "zzz": 1}])
    assert all(option in str(caught.value) for option in options_of(name))


@over_optimizers
def test_what_is_not_a_list_of_parameters(name: str) -> None:
    make = OPTIMIZERS[name]
    for empty in ([], iter([]), (p for p in []), {}.values()):
        with pytest.raises(ConfigError, match="empty parameter list"):
            make(empty)
    for wrong in (parameters()[0], [{"params": set(parameters())}], [3.0], [{"params": [None]}]):
        with pytest.raises(TypeError):
            make(wrong)
    with pytest.raises(ValueError, match="non-leaf"):
        make([parameters()[0] * 2])
    with pytest.raises(ConfigError, match="param_group must be a dict"):
        make(parameters()).add_param_group(parameters(seed=1))


@pytest.mark.parametrize("lone", [False, True], ids=["in a list", "lone"])
@over_optimizers
def test_complex_parameters(name: str, lone: bool) -> None:
    p = nn.Parameter(torch.zeros(3, 3, dtype=torch.complex64))
    group = {"params": p if lone else [p]}
    with pytest.raises(ConfigError, match="complex.*complex64.*view_as_real"):
        OPTIMIZERS[name]([group])
    if not lone:
        with pytest.raises(ConfigError, match="weight: complex"):
            OPTIMIZERS[name]([("weight", p)])


@over_optimizers
def test_parameters_of_other_dtypes(name: str) -> None:
    """At once, not at the first step."""
    p = nn.Parameter(torch.zeros(3, 3, dtype=torch.float8_e4m3fn))
    with pytest.raises(ConfigError, match="float8_e4m3fn"):
        OPTIMIZERS[name]([p])
    OPTIMIZERS[name]([p.requires_grad_(False)])  # nothing of a frozen one needs to be supported


@over_optimizers
def test_runtime_that_is_no_runtime(name: str) -> None:
    for wrong in ("sync", {"refresh": "sync"}, RuntimeConfig):
        with pytest.raises(ConfigError, match="RuntimeConfig"):
            OPTIMIZERS[name](parameters(), runtime=wrong)


# Field -> values that no version takes.
UNKNOWN_RUNTIME: dict[str, list[Any]] = {
    "refresh": ["never", None, ["sync"]],
    "refresh_method": ["svd", None],
    "refresh_on": ["moon", None],
    "staleness": [-1, 1.5, "2", None, True],
    "install": ["now", None],
    "start": ["cold", None],
    "workers": [0, "many"],
    "max_failures": [0, "many", None],
    "device_budget": ["8 apples", -1, 1.5],
    "host_budget": ["", "GiB", "-1GiB"],
    "nvme_budget": ["1e9", "1XiB"],
    "nvme_path": [3],
    "state_dtype": ["float32", torch.int8, None],
    "factors": ["square", None],
    "nonfinite": ["ignore", None],
    "trace": [3],
    "shards": ["some", None],
    "process_group": ["world", 3],
    "node_size": [0, "two"],
}


def test_runtime_values_that_are_unknown() -> None:
    fields = {field.name for field in dataclasses.fields(RuntimeConfig)}
    assert fields == UNKNOWN_RUNTIME.keys()
    for name, values in UNKNOWN_RUNTIME.items():
        for value in values:
            with pytest.raises(ConfigError, match=rf"RuntimeConfig\.{name}\b"):
                RuntimeConfig(**{name: value})


def test_runtime_is_frozen_and_compares_by_value() -> None:
    runtime = RuntimeConfig(nonfinite="skip")
    with pytest.raises(dataclasses.FrozenInstanceError):
        runtime.nonfinite = "raise"  # type: ignore[misc]
    assert runtime == RuntimeConfig(nonfinite="skip") != RuntimeConfig()
    assert RuntimeConfig.reference().start == "eigh"
    assert eval(repr(runtime)) == runtime
    with pytest.raises(TypeError):
        RuntimeConfig("sync")  # type: ignore[misc]


def refuses_step(optimizer: torch.optim.Optimizer, error: type[Exception], match: str) -> None:
    """The step raises, and no bit of a weight or of the state has changed."""
    before: Bits = everything(optimizer)
    with pytest.raises(error, match=match) as caught:
        optimizer.step()
    assert isinstance(caught.value, AsteriaError)
    assert_same_bits(everything(optimizer), before)


@pytest.mark.parametrize("steps", [0, 3], ids=["first step", "later"])
@over_arms
def test_sparse_gradients(arm: Arm, steps: int) -> None:
    params = parameters()
    optimizer = arm([(f"layer.{index}", p) for index, p in enumerate(params)])
    train(optimizer, range(steps))
    set_gradients(params, steps)
    params[2].grad = None
    nn.functional.embedding(torch.tensor([0, 2]), params[2], sparse=True).sum().backward()
    assert params[2].grad is not None
    assert params[2].grad.is_sparse
    refuses_step(optimizer, GradientError, r"layer\.2: .*sparse")
    params[2].grad = None
    optimizer.step()


@over_arms
def test_parameter_that_changed_since_its_state_was_made(arm: Arm) -> None:
    for data, found in (
        (torch.zeros(5, 4), r"\(5, 4\)"),
        (torch.zeros(4, 4, dtype=torch.bfloat16), "bfloat16"),
        (torch.zeros(4, 4, dtype=torch.float64), "float64"),
        (torch.zeros(16), r"\(16,\)"),
    ):
        params = parameters()
        optimizer = arm([(f"layer.{index}", p) for index, p in enumerate(params)])
        train(optimizer, range(3))
        original = params[2].data
        params[2].grad = None
        params[2].data = data
        set_gradients(params, 3)
        refuses_step(optimizer, ParameterChangedError, rf"layer\.2: .*\(4, 4\).*{found}")
        params[2].grad = None
        params[2].data = original
        train(optimizer, [3])


@over_alone_arms
def test_changed_parameter_may_begin_afresh(arm: Arm) -> None:
    """As the error advises, by removing its state."""
    params = parameters(SMALL, torch.float64)
    start = weights(params)
    optimizer = arm(params)
    train(optimizer, range(3))
    params[2].grad = None
    params[2].data = params[2].data[:3, :3].clone()
    del optimizer.state[params[2]]
    (alone,) = clones([params[2]])
    twin = arm([alone])
    train(optimizer, range(3, 7))
    train(twin, range(3, 7), first_index=2)
    actual, origin = {"0": params[2].detach()}, {"0": start["2"][:3, :3]}
    assert_near(actual, {"0": alone.detach()}, SAME_MATH, torch.float64, origin)
