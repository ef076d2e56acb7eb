"""Updates of KL-Shampoo and KL-SOAP, against the plain formulas."""

import itertools

import pytest
import torch
from torch import Tensor

from asteria.algorithms.algorithm import BlockShape, accumulate_, begin_
from asteria.algorithms.kl import KLSOAP, KLShampoo
from tests.algorithms.blocks import (
    BLOCKS,
    SHAPES,
    bases_of,
    changed,
    copied,
    gradient_of,
    hyper,
    ids,
    into_basis,
    normal,
    other_bases,
    out_of_basis,
    random_state,
    rotation,
    scratch_of,
    zero_state,
)

ONE = torch.ones((), dtype=torch.float64)
ZERO = torch.zeros((), dtype=torch.float64)
MATRICES = [shape for shape in SHAPES if len(shape.dims) > 1]
LETTERS = "ijkl"

every_shape = pytest.mark.parametrize("shape", MATRICES, ids=ids(MATRICES))


def test_fields_of_a_one_sided_block() -> None:
    block = BlockShape((4, 3), (False, True))
    statistics = {
        "factor_1": (3, 3),
        "basis_1": (3, 3),
        "inverse_root_0": (4,),
        "inverse_root_1": (3,),
        "eigenvalue_scale": (),
    }
    moment, square = {"exp_avg": (4, 3)}, {"exp_avg_sq": (4, 3)}
    found = {spec.name: spec.shape for spec in KLShampoo().fields(block)}
    assert found == moment | statistics
    found = {spec.name: spec.shape for spec in KLSOAP().fields(block)}
    assert found == moment | square | statistics


@pytest.mark.parametrize("gate", [None, ONE])
@every_shape
def test_kl_shampoo_preconditions_its_momentum_by_all_inverse_roots(
    shape: BlockShape, gate: Tensor | None
) -> None:
    rule, rank = KLShampoo(), len(shape.dims)
    state, gradient = random_state(rule, shape), gradient_of(shape)
    before, kept, pair = copied(state), gradient.clone(), scratch_of(gradient)
    bases = bases_of(state, rank)
    momentum = 0.9 * before["exp_avg"] + 0.1 * gradient
    letters = LETTERS[:rank]
    roots = [state[f"inverse_root_{mode}"] for mode in range(rank)]
    product = torch.einsum(",".join(f"b{x}" for x in letters) + f"->b{letters}", *roots)
    wanted = out_of_basis(into_basis(momentum, bases) / (1 / product + 1e-3), bases)

    update, scale = rule.direction_(state, gradient, hyper(), step=3, scratch=pair, gate=gate)

    torch.testing.assert_close(update, wanted)
    torch.testing.assert_close(state["exp_avg"], momentum)
    assert scale == 1.0
    assert changed(before, state) == {"exp_avg"}
    assert torch.equal(gradient, kept)
    assert update is pair[0] or update is pair[1]


@pytest.mark.parametrize("gate", [None, ONE])
@every_shape
def test_kl_soap_is_adam_without_bias_correction_in_the_eigenbasis(
    shape: BlockShape, gate: Tensor | None
) -> None:
    rule = KLSOAP()
    state, gradient = random_state(rule, shape), gradient_of(shape)
    before, bases, pair = copied(state), bases_of(state, len(shape.dims)), scratch_of(gradient)
    projected = into_basis(gradient, bases)
    mean = 0.9 * before["exp_avg"] + 0.1 * projected
    square = 0.8 * before["exp_avg_sq"] + 0.2 * projected**2

    update, scale = rule.direction_(state, gradient, hyper(), step=3, scratch=pair, gate=gate)

    wanted = out_of_basis(mean / (square.sqrt() + 1e-3), bases)
    torch.testing.assert_close(update, wanted)
    torch.testing.assert_close(state["exp_avg"], mean)
    torch.testing.assert_close(state["exp_avg_sq"], square)
    assert scale == 1.0
    assert changed(before, state) == {"exp_avg", "exp_avg_sq"}


def test_an_inverse_root_of_zero_forbids_its_direction() -> None:
    rule, shape = KLShampoo(), BlockShape((4, 3), (True, True))
    state, gradient = random_state(rule, shape), gradient_of(shape)
    state["inverse_root_0"][:, 2] = 0
    for eps in (1e-3, 0.0):
        update, _ = rule.direction_(
            state, gradient, hyper(eps=eps), step=1, scratch=scratch_of(gradient), gate=None
        )
        there = into_basis(update, bases_of(state, 2))
        assert torch.isfinite(update).all()
        assert there[:, 2].abs().max() < 1e-12
        assert there[:, [0, 1, 3]].abs().min() > 0


def run(rule: KLShampoo | KLSOAP, shape: BlockShape, scale: float) -> Tensor:
    """The last update of three steps on scaled gradients, in float64, with eps 0."""
    state, given = zero_state(rule, shape), hyper(eps=0.0, max_inverse_root=4000)
    for mode, factored in enumerate(shape.factored):
        if factored:
            state[f"basis_{mode}"].copy_(rotation(shape.dims[mode], seed=mode))
    for step in range(1, 4):
        gradient = scale * gradient_of(shape, seed=step)
        pair = scratch_of(gradient)
        if step == 1:
            begin_(rule, state, gradient, given)
        update, _ = rule.direction_(state, gradient, given, step=step, scratch=pair, gate=None)
        update = update.clone()
        accumulate_(rule, state, gradient, given, scratch=pair, gate=None)
    return update


@pytest.mark.parametrize("scale", [1e-6, 1e6])
@pytest.mark.parametrize("rule", [KLShampoo(), KLSOAP()])
@every_shape
def test_updates_do_not_depend_on_the_scale_of_the_gradients(
    shape: BlockShape, rule: KLShampoo | KLSOAP, scale: float
) -> None:
    torch.testing.assert_close(run(rule, shape, scale), run(rule, shape, 1.0))


@every_shape
def test_rotating_moves_the_first_moment_of_kl_soap_and_nothing_of_kl_shampoo(
    shape: BlockShape,
) -> None:
    rank = len(shape.dims)
    for chosen in itertools.product([False, True], repeat=rank):
        state = random_state(KLSOAP(), shape)
        before, old = copied(state), bases_of(state, rank)
        fresh = [
            rotation(size, seed=60 + mode) if chosen[mode] and old[mode] is not None else old[mode]
            for mode, size in enumerate(shape.dims)
        ]
        pair = scratch_of(state["exp_avg"])
        KLSOAP().rotate_(state, fresh, scratch=pair, gate=None)
        there = out_of_basis(before["exp_avg"], old)
        torch.testing.assert_close(out_of_basis(state["exp_avg"], fresh), there)
        assert changed(before, state) <= {"exp_avg"}, "all but the first moment stay"

        state = random_state(KLShampoo(), shape)
        before = copied(state)
        KLShampoo().rotate_(state, fresh, scratch=pair, gate=None, bound=1.0)
        assert changed(before, state) == set()


@pytest.mark.parametrize("gate", [None, ONE, ZERO])
@every_shape
def test_a_bounded_rotation_leaves_no_momentum_that_the_second_moment_has_not_seen(
    shape: BlockShape, gate: Tensor | None
) -> None:
    state, plain = random_state(KLSOAP(), shape), random_state(KLSOAP(), shape)
    for one in (state, plain):
        one["exp_avg_sq"].mul_(1e-6)
    before, fresh, pair = copied(state), other_bases(state, shape), scratch_of(state["exp_avg"])
    KLSOAP().rotate_(plain, fresh, scratch=pair, gate=gate)
    KLSOAP().rotate_(state, fresh, scratch=pair, gate=gate, bound=1.0)
    if gate is ZERO:
        assert changed(before, state) == set()
        return
    assert changed(plain, state) == {"exp_avg_sq"}
    wanted = torch.maximum(before["exp_avg_sq"], state["exp_avg"] ** 2)
    assert torch.equal(state["exp_avg_sq"], wanted)


@pytest.mark.parametrize("rule", [KLShampoo(), KLSOAP()])
def test_blocks_of_a_stack_do_not_meet(rule: KLShampoo | KLSOAP) -> None:
    shape = BlockShape((4, 3), (True, True))
    whole, gradient = random_state(rule, shape), normal(BLOCKS, 4, 3)
    alone = {name: tensor[1:2].clone() for name, tensor in whole.items()}
    for state, given in ((whole, gradient), (alone, gradient[1:2].clone())):
        pair = scratch_of(given)
        rule.direction_(state, given, hyper(), step=1, scratch=pair, gate=None)
        accumulate_(rule, state, given, hyper(max_inverse_root=10), scratch=pair, gate=None)
    for name, tensor in whole.items():
        torch.testing.assert_close(tensor[1:2], alone[name], rtol=1e-12, atol=1e-14)


def test_what_they_tell_the_step_loop() -> None:
    for rule, name in ((KLShampoo(), "kl-shampoo"), (KLSOAP(), "kl-soap")):
        assert rule.name == name
        assert (rule.has_bases, rule.squeezes, rule.sorts_columns) == (True, True, False)
