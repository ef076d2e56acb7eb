"""SOAP's rule for a stack of blocks, against the plain formulas."""

import itertools

import pytest
import torch
from torch import Tensor

from asteria.algorithms.algorithm import BlockShape, accumulate_, begin_
from asteria.algorithms.soap import SOAP
from tests.algorithms.blocks import (
    SHAPES,
    bases_of,
    changed,
    copied,
    gradient_of,
    gram,
    hyper,
    ids,
    into_basis,
    other_bases,
    out_of_basis,
    random_state,
    rotation,
    scratch_of,
    zero_state,
)

ONE = torch.ones((), dtype=torch.float64)
ZERO = torch.zeros((), dtype=torch.float64)

every_shape = pytest.mark.parametrize("shape", SHAPES, ids=ids(SHAPES))


def test_fields_of_a_one_sided_block() -> None:
    fields = SOAP().fields(BlockShape((4, 3, 2), (True, False, True)))
    assert {spec.name: spec.shape for spec in fields} == {
        "exp_avg": (4, 3, 2),
        "exp_avg_sq": (4, 3, 2),
        "factor_0": (4, 4),
        "factor_2": (2, 2),
        "basis_0": (4, 4),
        "basis_2": (2, 2),
    }


@pytest.mark.parametrize("gate", [None, ONE])
@every_shape
def test_direction_is_adam_in_the_eigenbasis(shape: BlockShape, gate: Tensor | None) -> None:
    state, gradient = random_state(SOAP(), shape), gradient_of(shape)
    before, kept = copied(state), gradient.clone()
    bases, pair = bases_of(state, len(shape.dims)), scratch_of(gradient)
    projected = into_basis(gradient, bases)
    mean = 0.9 * before["exp_avg"] + 0.1 * projected
    square = 0.8 * before["exp_avg_sq"] + 0.2 * projected**2
    wanted = out_of_basis(mean / (square.sqrt() + 1e-3), bases)

    update, scale = SOAP().direction_(state, gradient, hyper(), step=7, scratch=pair, gate=gate)

    torch.testing.assert_close(update, wanted)
    torch.testing.assert_close(state["exp_avg"], mean)
    torch.testing.assert_close(state["exp_avg_sq"], square)
    assert scale == pytest.approx((1 - 0.8**7) ** 0.5 / (1 - 0.9**7))
    assert changed(before, state) == {"exp_avg", "exp_avg_sq"}
    assert torch.equal(gradient, kept)
    assert update is pair[0] or update is pair[1]


def test_direction_without_bias_correction() -> None:
    state, gradient = random_state(SOAP(), SHAPES[1]), gradient_of(SHAPES[1])
    given = hyper(correct_bias=False)
    pair = scratch_of(gradient)
    _, scale = SOAP().direction_(state, gradient, given, step=1, scratch=pair, gate=None)
    assert scale == 1.0


@every_shape
def test_the_direction_turns_with_the_parameter_space(shape: BlockShape) -> None:
    """Turning gradient and bases alike turns the update: only the eigenbasis matters."""
    state, gradient = random_state(SOAP(), shape), gradient_of(shape)
    turned, turns = copied(state), [rotation(n, seed=n) for n in shape.dims]
    for mode in range(len(shape.dims)):
        if f"basis_{mode}" not in state:
            turns[mode] = torch.eye(shape.dims[mode], dtype=torch.float64).expand_as(turns[mode])
        else:
            turned[f"basis_{mode}"] = turns[mode] @ state[f"basis_{mode}"]
    pair = scratch_of(gradient)
    update = SOAP().direction_(state, gradient, hyper(), step=1, scratch=pair, gate=None)[0]
    other = out_of_basis(gradient, turns).contiguous()
    pair = scratch_of(other)
    found = SOAP().direction_(turned, other, hyper(), step=1, scratch=pair, gate=None)[0]
    torch.testing.assert_close(found, out_of_basis(update, turns))


@every_shape
def test_begin_makes_the_factors_of_the_first_gradient(shape: BlockShape) -> None:
    state, gradient = zero_state(SOAP(), shape), gradient_of(shape)
    before = copied(state)
    begin_(SOAP(), state, gradient, hyper())
    names = {f"factor_{mode}" for mode, factored in enumerate(shape.factored) if factored}
    assert changed(before, state) == names
    for name in names:
        torch.testing.assert_close(state[name], 0.3 * gram(gradient, int(name[-1])))


@pytest.mark.parametrize("gate", [None, ONE])
@every_shape
def test_accumulate_decays_the_factors_by_their_own_beta(
    shape: BlockShape, gate: Tensor | None
) -> None:
    state, gradient = random_state(SOAP(), shape), gradient_of(shape)
    before, kept = copied(state), gradient.clone()
    accumulate_(SOAP(), state, gradient, hyper(), scratch=scratch_of(gradient), gate=gate)
    names = {f"factor_{mode}" for mode, factored in enumerate(shape.factored) if factored}
    assert changed(before, state) == names
    for name in names:
        wanted = 0.7 * before[name] + 0.3 * gram(gradient, int(name[-1]))
        torch.testing.assert_close(state[name], wanted)
    assert torch.equal(gradient, kept)


@every_shape
def test_a_closed_gate_leaves_every_bit(shape: BlockShape) -> None:
    state, gradient = random_state(SOAP(), shape), gradient_of(shape)
    before = copied(state)
    pair = scratch_of(gradient)
    SOAP().direction_(state, gradient, hyper(), step=3, scratch=pair, gate=ZERO)
    accumulate_(SOAP(), state, gradient, hyper(), scratch=pair, gate=ZERO)
    fresh = other_bases(state, shape)
    SOAP().rotate_(state, fresh, scratch=pair, gate=ZERO)
    assert changed(before, state) == set()


@pytest.mark.parametrize("gate", [None, ONE])
@every_shape
def test_rotating_keeps_the_first_moment_where_it_is_in_the_parameter_space(
    shape: BlockShape, gate: Tensor | None
) -> None:
    rank = len(shape.dims)
    for chosen in itertools.product([False, True], repeat=rank):
        state = random_state(SOAP(), shape)
        before, old = copied(state), bases_of(state, rank)
        fresh = [
            rotation(size, seed=50 + mode) if chosen[mode] and old[mode] is not None else old[mode]
            for mode, size in enumerate(shape.dims)
        ]
        SOAP().rotate_(state, fresh, scratch=scratch_of(state["exp_avg"]), gate=gate)
        there = out_of_basis(before["exp_avg"], old)
        torch.testing.assert_close(out_of_basis(state["exp_avg"], fresh), there)
        assert changed(before, state) <= {"exp_avg"}, "the second moment and the bases stay"


@pytest.mark.parametrize("gate", [None, ONE, ZERO])
@every_shape
def test_a_bounded_rotation_leaves_no_momentum_that_the_second_moment_has_not_seen(
    shape: BlockShape, gate: Tensor | None
) -> None:
    state, plain = random_state(SOAP(), shape), random_state(SOAP(), shape)
    for one in (state, plain):
        one["exp_avg_sq"].mul_(1e-6)
    before, fresh, pair = copied(state), other_bases(state, shape), scratch_of(state["exp_avg"])
    SOAP().rotate_(plain, fresh, scratch=pair, gate=gate)
    SOAP().rotate_(state, fresh, scratch=pair, gate=gate, bound=1.0)
    if gate is ZERO:
        assert changed(before, state) == set()
        return
    assert changed(plain, state) == {"exp_avg_sq"}
    wanted = torch.maximum(before["exp_avg_sq"], state["exp_avg"] ** 2)
    assert torch.equal(state["exp_avg_sq"], wanted)


def test_its_columns_are_sorted_and_vectors_are_left_to_routing() -> None:
    assert (SOAP().has_bases, SOAP().sorts_columns, SOAP().squeezes) == (True, True, False)
