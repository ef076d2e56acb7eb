"""State of other optimizers: AdamW's and the published SOAP's are taken, or refused as a whole."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

import asteria
from asteria import CheckpointError
from asteria.optim.optimizer import SecondOrderOptimizer
from tests.support.arms import OPTIMIZERS, Arm, over_all_arms, over_optimizers
from tests.support.training import (
    MIXED,
    assert_same_bits,
    clones,
    everything,
    parameters,
    same_bits,
    train,
    weights,
)

Adam = type[torch.optim.Adam]
STEPS = 5
TILES = {"max_precond_dim": 4, "large_dims": "blocks"}


def adamw(kind: Adam = torch.optim.AdamW, **options: Any) -> torch.optim.Optimizer:
    optimizer = kind(parameters(MIXED), lr=0.01, betas=(0.8, 0.9), **options)
    train(optimizer, range(STEPS))
    return optimizer


def switched(arm: Arm, source: torch.optim.Optimizer, **options: Any) -> SecondOrderOptimizer:
    optimizer = arm(clones(source.param_groups[0]["params"]), **options)
    optimizer.load_state_dict(source.state_dict())
    return optimizer


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"maximize": True}], ids=str)
@over_all_arms
def test_a_run_of_adamw_goes_on(arm: Arm, kind: Adam, options: dict[str, Any]) -> None:
    source = adamw(kind, **options)
    before = copy.deepcopy(source.state_dict())
    optimizer = switched(arm, source)
    for p, q in zip(*(o.param_groups[0]["params"] for o in (optimizer, source)), strict=True):
        mine, theirs = optimizer.state[p], source.state[q]
        assert mine["step"] == theirs["step"] == STEPS
        assert same_bits(mine["exp_avg"].reshape(p.shape), theirs["exp_avg"])
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["eps"]) == (0.01, (0.8, 0.9), 1e-8)
    assert group["maximize"] == options.get("maximize", False)
    assert (
        group["precondition_frequency"]
        == arm([torch.nn.Parameter(torch.ones(2))]).defaults["precondition_frequency"]
    ), "what AdamW does not have is ours"
    assert not {"amsgrad", "foreach", "fused"} & group.keys()
    start = weights(group["params"])
    train(optimizer, range(STEPS, STEPS + 10))
    for index, p in enumerate(group["params"]):
        assert optimizer.state[p]["step"] == STEPS + 10
        assert not same_bits(start[f"{index}"], p)
    assert all(bool(value.isfinite().all()) for value in everything(optimizer).values())
    for index, entries in before["state"].items():
        assert_same_bits(source.state_dict()["state"][index], entries)


@over_optimizers
def test_vectors_go_on_as_under_adamw(name: str) -> None:
    """Their rule is the same but for eps, which is tiny here."""
    source = torch.optim.AdamW(parameters([(5,), ()], torch.float64), eps=1e-30, weight_decay=0.0)
    train(source, range(STEPS))
    options = {"correct_bias": True} if name == "SOAP" else {}
    optimizer = OPTIMIZERS[name](clones(source.param_groups[0]["params"]), **options)
    optimizer.load_state_dict(source.state_dict())
    for each in (source, optimizer):
        train(each, range(STEPS, STEPS + 5))
    for p, q in zip(*(o.param_groups[0]["params"] for o in (optimizer, source)), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=0)


@over_optimizers
def test_a_matrix_is_cut_into_tiles(name: str) -> None:
    source = torch.optim.AdamW(parameters([(7, 4)]))
    train(source, range(STEPS))
    (q,) = source.param_groups[0]["params"]
    optimizer = OPTIMIZERS[name](clones([q]), **TILES)
    optimizer.load_state_dict(source.state_dict())
    (p,) = optimizer.param_groups[0]["params"]
    tiles = [optimizer.state[p][key].reshape(-1, 4) for key in ("exp_avg.0", "exp_avg.1")]
    assert torch.equal(torch.cat(tiles), source.state[q]["exp_avg"])


@over_optimizers
def test_a_new_optimizer_takes_options_only(name: str) -> None:
    source = torch.optim.AdamW(parameters(MIXED), lr=0.5)
    optimizer = OPTIMIZERS[name](parameters(MIXED))
    optimizer.load_state_dict(source.state_dict())
    assert not optimizer.state
    assert optimizer.param_groups[0]["lr"] == 0.5


def published(**changes: Any) -> dict[str, Any]:
    """State of one 4x3 matrix and a vector, after the first refresh."""
    matrix = {
        "step": 12,
        "exp_avg": torch.ones(4, 3),
        "exp_avg_sq": torch.ones(4, 3),
        "GG": [torch.eye(4), torch.eye(3)],
        "Q": [torch.eye(4), torch.eye(3)],
        "precondition_frequency": 10,
        "shampoo_beta": 0.95,
    }
    vector = matrix | {"exp_avg": torch.ones(5), "exp_avg_sq": torch.ones(5), "GG": [[]], "Q": [[]]}
    group = {
        "lr": 0.5,
        "betas": (0.9, 0.95),
        "shampoo_beta": -1,
        "eps": 1e-8,
        "weight_decay": 0.0,
        "precondition_frequency": 10,
        "max_precond_dim": 100,
        "merge_dims": False,
        "precondition_1d": False,
        "normalize_grads": False,
        "correct_bias": True,
        "params": [0, 1],
    }
    return {"state": {0: matrix | changes, 1: vector}, "param_groups": [group]}


def test_the_published_soap_s_options_and_counters() -> None:
    optimizer = asteria.SOAP(parameters([(4, 3), (5,)]), stochastic_rounding=True)
    optimizer.load_state_dict(published())
    group = optimizer.param_groups[0]
    assert (group["lr"], group["shampoo_beta"], group["stochastic_rounding"]) == (0.5, None, True)
    entries = optimizer.state[group["params"][0]]
    assert (entries["step"], entries["version"], entries["born"]) == (12, 10, 0)
    assert optimizer.stats().in_flight == 0


Change = Callable[[dict[str, Any]], dict[str, Any]]
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no basis": ({"Q": None}, "GG and Q are not lists"),
    "not square": ({"Q": [torch.eye(4), torch.ones(3, 2)]}, "GG and Q are not lists"),
    "another size": ({key: [torch.eye(4), torch.eye(2)] for key in ("GG", "Q")}, "factor_1 has"),
    "one sided": ({"GG": [[], torch.eye(3)], "Q": [[], torch.eye(3)]}, "has factors (GG) of sizes"),
    "more dims": ({"GG": [torch.eye(4)] * 3, "Q": [torch.eye(4)] * 3}, "has factors (GG)"),
    "fewer bases": ({"Q": [torch.eye(4)]}, "GG and Q are not lists of equally many"),
    "moment": ({"exp_avg": torch.ones(3, 4)}, "exp_avg is (3, 4), needs a tensor of shape (4, 3)"),
    "no moment": ({"exp_avg_sq": "lost"}, "exp_avg_sq is str"),
    "counter": ({"step": "many"}, "step"),
    "period": ({"precondition_frequency": 0}, "precondition_frequency"),
}


@pytest.mark.parametrize(("changes", "message"), WRONG.values(), ids=WRONG)
def test_a_published_state_that_does_not_fit(changes: dict[str, Any], message: str) -> None:
    optimizer = asteria.SOAP(parameters([(4, 3), (5,)]))
    train(optimizer, range(3))
    before, options = everything(optimizer), {**optimizer.param_groups[0]}
    with pytest.raises(CheckpointError, match="nothing was loaded") as caught:
        optimizer.load_state_dict(published(**changes))
    assert message in str(caught.value)
    assert_same_bits(everything(optimizer), before)
    assert optimizer.param_groups[0] == options


def test_a_published_state_without_a_part() -> None:
    for key in published()["state"][0].keys() - {"shampoo_beta"}:
        saved = published()
        del saved["state"][0][key]
        optimizer = asteria.SOAP(parameters([(4, 3), (5,)]))
        with pytest.raises(CheckpointError, match=f"{key} missing in the state of the published"):
            optimizer.load_state_dict(saved)


@pytest.mark.parametrize("name", ["KLShampoo", "KLSOAP"])
def test_only_soap_takes_the_published_soap_s(name: str) -> None:
    optimizer = OPTIMIZERS[name](parameters([(4, 3), (5,)]))
    with pytest.raises(CheckpointError, match="published SOAP"):
        optimizer.load_state_dict(published())


def test_a_stack_is_no_matrix_of_the_published_soap() -> None:
    saved = published()
    saved["state"][0] |= {key: torch.ones(2, 33, 32) for key in ("exp_avg", "exp_avg_sq")}
    optimizer = asteria.SOAP(parameters([(2, 33, 32), (5,)]))
    with pytest.raises(CheckpointError, match="batch_dims=0"):
        optimizer.load_state_dict(saved)


def test_a_dim_of_one_has_a_sign() -> None:
    """The published program keeps a basis of one column, and QR may make it -1."""
    bases = [-torch.ones(1, 1), torch.eye(5)]
    moments = {key: torch.ones(1, 5) for key in ("exp_avg", "exp_avg_sq")}
    saved = published(**moments, Q=bases, GG=[torch.ones(1, 1), torch.eye(5)])
    optimizer = asteria.SOAP(parameters([(1, 5), (5,)]))
    optimizer.load_state_dict(saved)
    entries = optimizer.state[optimizer.param_groups[0]["params"][0]]
    assert torch.equal(entries["exp_avg"], -torch.ones(1, 5))
    assert torch.equal(entries["exp_avg_sq"], torch.ones(1, 5))
