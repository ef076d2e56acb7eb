"""Factors are shared out so that all ranks have about the same to do and to keep."""

import random

import pytest
import torch

from asteria import SOAP
from asteria.distributed.ownership import Load, assign, least_makespan, totals
from asteria.planner.architectures import MODELS, config_shapes
from asteria.runtime.routing import route

RANKS = [2, 3, 4, 6, 8, 12, 16, 32, 48, 64, 96, 128, 200, 256, 512, 1024]
LIMITS = [10000, 2048]
"""Largest dims that have a factor."""
REAL = ["gpt2", "llama-3.2-1b", "olmo-2-1b", "olmo-2-7b", "llama-2-70b"]


def loads_of(model: str, limit: int) -> list[Load]:
    """One for each matrix of a real model."""
    group = SOAP([torch.zeros(2, 2)], max_precond_dim=limit).param_groups[0]
    found = []
    for name, shape in config_shapes(MODELS[model]):
        for tile in route(torch.Size(shape), group, SOAP.rule, name).tiles:
            sizes = tile.shape.factor_sizes()
            if sizes:
                found.append(Load(tile.refresh_cost, 4.0 * tile.blocks * sum(n**2 for n in sizes)))
    return found


REAL_LOADS = {
    f"{model}-{limit}": loads
    for model in REAL
    for limit in LIMITS
    if (loads := loads_of(model, limit))
}


@pytest.mark.parametrize("loads", REAL_LOADS.values(), ids=REAL_LOADS)
def test_real_models_are_balanced(loads: list[Load]) -> None:
    for ranks in RANKS:
        owned = totals(loads, assign(loads, ranks), ranks)
        least = least_makespan([load.cost for load in loads], ranks)
        assert max(load.cost for load in owned) <= 1.05 * least, ranks


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("loads", REAL_LOADS.values(), ids=REAL_LOADS)
def test_shares_of_real_models(loads: list[Load], ranks: int) -> None:
    """Both, to within a tenth, where there are matrices enough."""
    owned = totals(loads, assign(loads, ranks), ranks)
    for each in zip(*owned, strict=True):
        assert max(each) <= 1.1 / ranks * sum(each)


def test_bytes_are_balanced_too() -> None:
    """Tall matrices that cost little to refresh and take much memory."""
    loads = [Load(10.0, 1.0)] * 4 + [Load(1.0, 10.0)] * 4
    owned = totals(loads, assign(loads, 4), 4)
    assert set(owned) == {Load(11.0, 11.0)}


def test_equals_go_to_the_ranks_in_turns() -> None:
    assert assign([Load(1.0, 1.0)] * 5, 3) == [0, 1, 2, 0, 1]


def test_what_comes_later_goes_to_who_has_least() -> None:
    carried = totals([Load(4.0, 4.0), Load(1.0, 1.0)], [0, 1], 2)
    assert assign([Load(1.0, 1.0)] * 3, 2, carried) == [1, 1, 1]


def test_nothing_to_own() -> None:
    assert assign([], 3) == []
    assert assign([Load(0.0, 0.0)] * 2, 3) == [0, 0]
    assert least_makespan([], 3) == 0.0


def test_the_bound_is_one() -> None:
    """Against all assignments of a few costs."""
    chance = random.Random(0)
    for _ in range(40):
        costs = [float(chance.choice([1, 2, 3, 5, 8])) for _ in range(7)]
        ranks = chance.choice([2, 3])
        best = min(
            max(
                sum(c for c, r in zip(costs, rest, strict=True) if r == rank)
                for rank in range(ranks)
            )
            for code in range(ranks ** len(costs))
            for rest in [[code // ranks**place % ranks for place in range(len(costs))]]
        )
        bound = least_makespan(costs, ranks)
        assert max(sum(costs) / ranks, max(costs)) <= bound * (1 + 1e-9)
        assert bound <= best * (1 + 1e-9)


def test_the_bound_knows_that_loads_are_not_divided() -> None:
    """Three equal ones on two ranks; and 32 of two, of which no rank takes one more."""
    assert least_makespan([1.0] * 3, 2) == pytest.approx(2.0)
    assert least_makespan([2.0] * 32 + [1.0] * 81, 64) == pytest.approx(3.0)
