"""What torch's own test suite asks of every optimizer, asked of ours.

Its generic tests run each optimizer over a table of options; so do these. What it also asks
stands elsewhere in this folder: hooks, closures and global hooks in test_hooks_and_closures; every
scheduler in test_schedulers; pickling and deepcopy in test_copies; state of other dtypes, from
weights_only files and from older versions in test_state_round_trip and test_wrong_state;
non-contiguous parameters in test_layouts; wrong arguments, sparse gradients and non-leaf tensors in
test_refusals; duplicates and names in test_groups; untouched gradients in test_loop_tools.

Exceptions, each with its reason:

- ``foreach``, ``fused``, ``capturable`` and ``differentiable`` do not exist: there is one
  implementation, which batches by itself, reads step counters on the host and is outside of
  autograd. They are refused like any other unknown name.
- Complex parameters are refused: factors of complex matrices are not implemented.
- A learning rate that is a tensor must be on the CPU and hold one element: reading it from a
  device would wait for the device at every step. ``betas`` must be numbers.
- A step with gradients of zero and without weight decay moves no weight, as torch asks, but it
  counts: ``step`` goes on, as in torch's Adam.
"""

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from asteria import ConfigError
from asteria.optim.optimizer import SecondOrderOptimizer
from tests.support.arms import OPTIMIZERS, PERIOD, over_optimizers
from tests.support.training import (
    assert_same_bits,
    clones,
    everything,
    parameters,
    train,
    weights,
)

STEPS = 12
HALF = 6

COMMON: dict[str, dict[str, Any]] = {
    "default": {},
    "rate": {"lr": 0.01},
    "tensor rate": {"lr": torch.tensor(0.01)},
    "tensor rate and decay": {"lr": torch.tensor(0.01), "weight_decay": 0.1},
    "decay": {"weight_decay": 0.9},
    "maximize": {"maximize": True, "weight_decay": 0.1},
    "betas": {"betas": (0.5, 0.75), "shampoo_beta": 0.9},
    "eps": {"eps": 1e-3},
    "normalized": {"normalize_grads": True},
    "tiles": {"max_precond_dim": 3, "large_dims": "blocks"},
    "one side": {"max_precond_dim": 5},
}
OWN: dict[str, dict[str, dict[str, Any]]] = {
    "SOAP": {
        "no bias correction": {"correct_bias": False},
        "merged": {"merge_dims": True, "precondition_1d": True},
    },
    "KLShampoo": {"published": {"init_factor": 0.1, "damp_factors": True}},
    "KLSOAP": {"published": {"init_factor": 0.1, "max_inverse_root": None}},
}
CASES = [
    pytest.param(name, options, id=f"{name}-{case}")
    for name in OPTIMIZERS
    for case, options in {**COMMON, **OWN[name]}.items()
]
over_cases = pytest.mark.parametrize(("name", "options"), CASES)


def make(name: str, params: Any, options: dict[str, Any]) -> SecondOrderOptimizer:
    """An optimizer of its own options, the tensors among them copied."""
    own = {"precondition_frequency": PERIOD} | copy.deepcopy(options)
    return OPTIMIZERS[name](params, **own)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@over_cases
def test_it_goes_in_the_right_direction(name: str, options: dict[str, Any]) -> None:
    """Down, or up with maximize: the squared output of a layer that sees one input."""
    weight, bias, x = nn.Parameter(draw(10, 6)), nn.Parameter(draw(10)), draw(6)
    optimizer = make(name, [weight, bias], options)

    def closure() -> float:
        optimizer.zero_grad()
        loss = (weight @ x + bias).square().sum()
        loss.backward()
        return loss.item()

    losses = [optimizer.step(closure) for _ in range(STEPS)]
    assert (losses[-1] > losses[0]) == optimizer.defaults["maximize"]


@over_cases
def test_loaded_state_continues_to_the_same_bits(name: str, options: dict[str, Any]) -> None:
    """From a dict in memory, from a file of tensors and plain values, and into a deep copy."""
    optimizer = make(name, parameters(), options)
    train(optimizer, range(HALF))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    states = [optimizer.state_dict(), torch.load(file, weights_only=True)]
    others = [copy.deepcopy(optimizer)]
    for state in states:
        params = clones(p for group in optimizer.param_groups for p in group["params"])
        others.append(make(name, params, options))
        others[-1].load_state_dict(state)
    for one in (optimizer, *others):
        train(one, range(HALF, STEPS))
    for other in others:
        assert_same_bits(everything(other), everything(optimizer))


@over_cases
def test_gradients_of_zero_move_nothing(name: str, options: dict[str, Any]) -> None:
    params = parameters()
    before = weights(params)
    optimizer = make(name, params, options | {"weight_decay": 0.0})
    train(optimizer, range(HALF), scale=0.0)
    assert_same_bits(weights(params), before)
    assert all(entries["step"] > 0 for entries in optimizer.state.values())


@over_cases
def test_weight_decay_is_of_the_group(name: str, options: dict[str, Any]) -> None:
    """Of two equal groups without gradients to speak of, one decays by lr * weight_decay."""
    kept, decayed = parameters([(4, 4)]), parameters([(4, 4)])
    groups = [{"params": kept, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.5}]
    optimizer = make(name, groups, options)
    train(optimizer, range(HALF), scale=0.0)
    factor = (1 - 0.5 * float(optimizer.defaults["lr"])) ** HALF
    torch.testing.assert_close(decayed[0].detach(), kept[0].detach() * factor)
    assert_same_bits(weights(kept), weights(parameters([(4, 4)])))


@pytest.mark.parametrize("flag", ["foreach", "fused", "capturable", "differentiable"])
@over_optimizers
def test_flags_of_torchs_implementations_do_not_exist(name: str, flag: str) -> None:
    with pytest.raises(TypeError, match=flag):
        OPTIMIZERS[name](parameters(), **{flag: False})
    with pytest.raises(ConfigError, match=flag):
        OPTIMIZERS[name]([{"params": parameters(), flag: False}])
    assert flag not in OPTIMIZERS[name](parameters()).defaults


@over_optimizers
def test_changed_defaults_are_those_of_later_groups(name: str) -> None:
    old, new = parameters(seed=1), parameters(seed=2)
    changed, plain = make(name, old, {}), make(name, clones(old), {})
    changed.defaults["lr"] = 0.25
    changed.add_param_group({"params": new})
    plain.add_param_group({"params": clones(new), "lr": 0.25})
    assert [group["lr"] for group in changed.param_groups] == [plain.defaults["lr"], 0.25]
    for optimizer in (changed, plain):
        train(optimizer, range(HALF))
    assert_same_bits(everything(changed), everything(plain))


@over_optimizers
def test_learning_rates_of_several_groups_may_be_tensors(name: str) -> None:
    runs = []
    for kind in (float, torch.tensor):
        first, second = parameters([(4, 4), (5,)])
        groups = [{"params": [first], "lr": kind(0.5)}, {"params": [second]}]
        runs.append(make(name, groups, {"lr": kind(0.25)}))
    for run in runs:
        train(run, range(HALF))
    numbers, tensors = runs
    assert_same_bits(everything(tensors), everything(numbers))
    assert isinstance(tensors.state_dict()["param_groups"][0]["lr"], Tensor)


@pytest.mark.parametrize(
    "lr",
    [torch.tensor([0.1, 0.2]), torch.tensor(0.1, device="meta"), torch.tensor(-0.1)],
    ids=["two elements", "not on the CPU", "negative"],
)
@over_optimizers
def test_tensors_that_are_no_learning_rate(name: str, lr: Tensor) -> None:
    with pytest.raises(ConfigError, match="lr"):
        OPTIMIZERS[name](parameters(), lr=lr)


@over_optimizers
def test_step_counters_of_older_files_are_numbers(name: str) -> None:
    """torch's files held ``step`` as a number until version 1.12; some tools still write it so."""
    optimizer = make(name, parameters(), {})
    train(optimizer, range(HALF))
    state = optimizer.state_dict()
    numbers = {
        key: {**entries, "step": entries["step"].item()} for key, entries in state["state"].items()
    }
    other = make(name, clones(optimizer.param_groups[0]["params"]), {})
    other.load_state_dict({**state, "state": numbers})
    for run in (optimizer, other):
        train(run, range(HALF, STEPS))
    assert_same_bits(everything(other), everything(optimizer))
    assert all(isinstance(entries["step"], Tensor) for entries in other.state.values())


@pytest.mark.parametrize("named", [(True, False), (False, True)], ids=["from", "into"])
@over_optimizers
def test_names_are_not_needed_for_loading(name: str, named: tuple[bool, bool]) -> None:
    runs = []
    for with_names in named:
        params: Any = parameters()
        if with_names:
            params = [(f"layer.{index}", p) for index, p in enumerate(params)]
        runs.append(make(name, params, {}))
    saved, loaded = runs
    train(saved, range(HALF))
    loaded.load_state_dict(saved.state_dict())
    for own, other in zip(*(run.param_groups[0]["params"] for run in runs), strict=True):
        other.data.copy_(own.data)
    for run in runs:
        train(run, range(HALF, STEPS))
    assert_same_bits(everything(loaded), everything(saved))


@over_optimizers
def test_all_parameters_have_names_or_none_has(name: str) -> None:
    one, two = parameters([(4, 4), (4, 4)])
    with pytest.raises(ValueError, match="names"):
        OPTIMIZERS[name]([("one", one), two])
    with pytest.raises(ValueError, match="names"):
        OPTIMIZERS[name]([{"params": [("one", one)]}, {"params": [two]}])
