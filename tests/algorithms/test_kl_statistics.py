"""Factors and eigenvalues of KL-Shampoo and KL-SOAP, against sums that are written out."""

import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from asteria.algorithms.algorithm import BlockShape, accumulate_, begin_
from asteria.algorithms.kl import KLSOAP, KLShampoo
from tests.algorithms.blocks import (
    BLOCKS,
    SHAPES,
    changed,
    copied,
    gradient_of,
    hyper,
    ids,
    other_bases,
    random_state,
    scratch_of,
    zero_state,
)

RULE = KLShampoo()
ONE = torch.ones((), dtype=torch.float64)
ZERO = torch.zeros((), dtype=torch.float64)
MATRICES = [shape for shape in SHAPES if len(shape.dims) > 1]
LETTERS = "ijkl"

every_shape = pytest.mark.parametrize("shape", MATRICES, ids=ids(MATRICES))


def roots_of(state: Mapping[str, Tensor]) -> list[Tensor]:
    rank = sum(name.startswith("inverse_root") for name in state)
    return [state[f"inverse_root_{mode}"] for mode in range(rank)]


def basis_or_identity(state: Mapping[str, Tensor], mode: int, size: int) -> Tensor:
    identity = torch.eye(size, dtype=torch.float64).expand(BLOCKS, size, size)
    return state.get(f"basis_{mode}", identity)


def whitened(
    gradient: Tensor, state: Mapping[str, Tensor], roots: list[Tensor], mode: int
) -> Tensor:
    """W_k: the gradient times s_j Q_j^T on every mode j but ``mode``, in one einsum."""
    dims = gradient.shape[1:]
    letters, operands, terms, result = LETTERS[: len(dims)], [gradient], "", ""
    for j, letter in enumerate(letters):
        if j == mode:
            result += letter
            continue
        basis = basis_or_identity(state, j, dims[j])
        operands.append(torch.einsum("bij,bj->bji", basis, roots[j]))
        terms += f",b{letter.upper()}{letter}"
        result += letter.upper()
    return torch.einsum(f"b{letters}{terms}->b{result}", *operands)


def outer(w: Tensor, mode: int) -> Tensor:
    """W_k W_k^T, summed over the other modes."""
    letters = LETTERS[: w.dim() - 1]
    other = letters.replace(letters[mode], "z")
    return torch.einsum(f"b{letters},b{other}->b{letters[mode]}z", w, w)


def spectrum(w: Tensor, state: Mapping[str, Tensor], mode: int) -> Tensor:
    """Mean over the other modes of (Q_k^T W_k)^2."""
    letters = LETTERS[: w.dim() - 1]
    basis = basis_or_identity(state, mode, w.shape[mode + 1])
    turned = torch.einsum(
        f"b{letters},b{letters[mode]}z->b{letters.replace(letters[mode], 'z')}", w, basis
    )
    others = [axis for axis in range(1, w.dim()) if axis != mode + 1]
    return turned.square().mean(others)


def expected(gradient: Tensor, state: Mapping[str, Tensor], eps: float = 0.0) -> dict[str, Tensor]:
    """The next factors and inverse roots, unclamped, with shampoo_beta = 0.7; eps damps."""
    old = roots_of(state)
    new, rank, wanted = list(old), len(old), {}
    for mode in reversed(range(rank)):
        # The published code of rank 3 goes from the last mode to the first and uses the new
        # inverse roots of the mode just done: for every eigenvalue, for the first factor only.
        seen = list(old)
        if rank == 3 and mode < 2:
            seen[mode + 1] = new[mode + 1]
        value = spectrum(whitened(gradient, state, seen, mode), state, mode)
        means = [root.square().mean(-1, keepdim=True) for j, root in enumerate(old) if j != mode]
        value = value + eps * math.prod(means[1:], start=means[0])
        new[mode] = (0.7 / old[mode].square() + 0.3 * value).rsqrt()
        wanted[f"inverse_root_{mode}"] = new[mode]
        if f"factor_{mode}" in state:
            w = whitened(gradient, state, seen if mode == 0 else old, mode)
            share = state[f"factor_{mode}"].shape[-1] / gradient[0].numel()
            wanted[f"factor_{mode}"] = 0.7 * state[f"factor_{mode}"] + 0.3 * share * outer(w, mode)
    return wanted


@pytest.mark.parametrize("gate", [None, ONE])
@pytest.mark.parametrize("rule", [KLShampoo(), KLSOAP()])
@every_shape
def test_accumulate(shape: BlockShape, rule: KLShampoo | KLSOAP, gate: Tensor | None) -> None:
    state, gradient = random_state(rule, shape), gradient_of(shape)
    before, kept = copied(state), gradient.clone()
    accumulate_(rule, state, gradient, hyper(), scratch=scratch_of(gradient), gate=gate)
    wanted = expected(gradient, before)
    assert changed(before, state) == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(state[name], value, msg=lambda text, n=name: f"{n}: {text}")
    assert torch.equal(gradient, kept)


@every_shape
def test_damping_adds_eps_times_the_other_modes_mean_square(shape: BlockShape) -> None:
    state, gradient = random_state(RULE, shape), gradient_of(shape)
    before, given = copied(state), hyper(damp_factors=True, eps=0.5)
    accumulate_(RULE, state, gradient, given, scratch=scratch_of(gradient), gate=None)
    for name, value in expected(gradient, before, eps=0.5).items():
        torch.testing.assert_close(state[name], value)
    undamped = expected(gradient, before)
    assert not torch.allclose(state["inverse_root_0"], undamped["inverse_root_0"])


@pytest.mark.parametrize(("limit", "bound"), [(4000, 30.0), (20, 20.0), (3, 10.0)])
def test_inverse_roots_are_clamped_relative_to_the_scale(limit: float, bound: float) -> None:
    """The bound is max(10, min(n, limit)) at the published scale of 0.1."""
    shape = BlockShape((30, 2), (True, True))
    state, gradient = random_state(RULE, shape), gradient_of(shape)
    scales = torch.tensor([0.1, 0.4, 1000.0], dtype=torch.float64)
    state["eigenvalue_scale"].copy_(scales)
    for mode in range(2):
        state[f"inverse_root_{mode}"].fill_(1e6)
    given, gradient = hyper(max_inverse_root=limit), 1e-9 * gradient
    accumulate_(RULE, state, gradient, given, scratch=scratch_of(gradient), gate=None)
    allowed = (bound, max(10.0, min(2.0, limit)))
    for mode, size in enumerate((30, 2)):
        wanted = allowed[mode] * (0.1 / scales).sqrt().unsqueeze(-1).expand(3, size)
        torch.testing.assert_close(state[f"inverse_root_{mode}"], wanted)


def test_without_clamping_inverse_roots_are_unbounded() -> None:
    shape = BlockShape((4, 3), (True, True))
    state, gradient = random_state(RULE, shape), torch.zeros(BLOCKS, 4, 3, dtype=torch.float64)
    state["inverse_root_0"].fill_(1e6)
    accumulate_(RULE, state, gradient, hyper(), scratch=scratch_of(gradient), gate=None)
    wanted = torch.full((BLOCKS, 4), 1e6 / 0.7**0.5, dtype=torch.float64)
    torch.testing.assert_close(state["inverse_root_0"], wanted)


@pytest.mark.parametrize("rule", [KLShampoo(), KLSOAP()])
@every_shape
def test_a_closed_gate_leaves_every_bit(shape: BlockShape, rule: KLShampoo | KLSOAP) -> None:
    state = random_state(rule, shape)
    before = copied(state)
    for gradient in (gradient_of(shape), torch.zeros_like(gradient_of(shape))):
        pair = scratch_of(gradient)
        accumulate_(rule, state, gradient, hyper(), scratch=pair, gate=ZERO)
        rule.direction_(state, gradient, hyper(), step=2, scratch=pair, gate=ZERO)
        rule.rotate_(state, other_bases(state, shape), scratch=pair, gate=ZERO)
        assert changed(before, state) == set()


@every_shape
def test_begin_with_a_constant_is_the_published_beginning(shape: BlockShape) -> None:
    state, gradient = zero_state(RULE, shape), gradient_of(shape)
    begin_(RULE, state, gradient, hyper(init_factor=0.25))
    assert state["eigenvalue_scale"].tolist() == pytest.approx([0.1] * BLOCKS)
    for mode, size in enumerate(shape.dims):
        wanted = torch.full((BLOCKS, size), 2.0, dtype=torch.float64)
        torch.testing.assert_close(state[f"inverse_root_{mode}"], wanted)
        if shape.factored[mode]:
            share = size / gradient[0].numel()
            torch.testing.assert_close(state[f"factor_{mode}"], 0.3 * share * outer(gradient, mode))


@every_shape
def test_begin_from_the_gradient_whitens_by_its_mean_square(shape: BlockShape) -> None:
    state, gradient = zero_state(RULE, shape), gradient_of(shape)
    kept, rank = gradient.clone(), len(shape.dims)
    begin_(RULE, state, gradient, hyper())
    first = gradient.square().flatten(1).mean(-1) ** (1 / rank)
    torch.testing.assert_close(state["eigenvalue_scale"], first)
    for mode, size in enumerate(shape.dims):
        wanted = first.rsqrt().unsqueeze(-1).expand(BLOCKS, size)
        torch.testing.assert_close(state[f"inverse_root_{mode}"], wanted)
        if shape.factored[mode]:
            share = size / gradient[0].numel() / first ** (rank - 1)
            value = 0.3 * share.view(-1, 1, 1) * outer(gradient, mode)
            torch.testing.assert_close(state[f"factor_{mode}"], value)
    assert torch.equal(gradient, kept)


@every_shape
def test_a_block_whose_gradient_was_zero_takes_its_scale_from_the_first_that_is_not(
    shape: BlockShape,
) -> None:
    first, second = gradient_of(shape), gradient_of(shape, seed=1)
    first[1] = 0
    state = zero_state(RULE, shape)
    begin_(RULE, state, first, hyper())
    assert state["eigenvalue_scale"][1] == 0
    assert not state["inverse_root_0"][1].any()
    scale = state["eigenvalue_scale"].clone()
    pair = scratch_of(second)
    accumulate_(RULE, state, second, hyper(max_inverse_root=4000), scratch=pair, gate=None)
    scale[1] = second[1].square().mean() ** (1 / len(shape.dims))
    torch.testing.assert_close(state["eigenvalue_scale"], scale)
    for name, tensor in state.items():
        assert torch.isfinite(tensor).all(), name
    assert (state["inverse_root_0"] > 0).all()


@every_shape
def test_a_gradient_that_stays_zero_stays_harmless(shape: BlockShape) -> None:
    state, gradient = zero_state(RULE, shape), torch.zeros_like(gradient_of(shape))
    begin_(RULE, state, gradient, hyper())
    pair = scratch_of(gradient)
    for step in range(1, 4):
        update, _ = RULE.direction_(
            state, gradient, hyper(eps=1e-8), step=step, scratch=pair, gate=None
        )
        assert not update.any()
        accumulate_(RULE, state, gradient, hyper(max_inverse_root=9), scratch=pair, gate=None)
    assert not any(tensor.any() for tensor in state.values())
