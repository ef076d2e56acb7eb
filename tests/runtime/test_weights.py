"""Directions become weights, in any dtype and layout."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from asteria.linalg.scratch import Scratch
from asteria.runtime import extents as extents_module
from asteria.runtime.chunks import Update, chunks
from asteria.runtime.records import ParameterRecord, TilePlan
from asteria.runtime.weights import apply_, gather, normalize_
from tests.runtime.layouts import (
    ADAMW,
    admitted,
    block,
    chunk_of,
    extent_of,
    fill,
    record,
    two_tiles,
    update,
    values,
)

ZERO, ONE = torch.tensor(0.0), torch.tensor(1.0)


@pytest.fixture(autouse=True)
def _without_gradients() -> object:
    with torch.no_grad():
        yield


def apply_all(
    updates: dict[ParameterRecord, Update],
    directions: dict[ParameterRecord, Tensor],
    *,
    scale: float = 1.0,
    gate: Tensor | None = None,
) -> None:
    """Apply a direction of each parameter's shape, chunk by chunk."""
    for extent in itertools.chain.from_iterable(admitted(*updates).values()):
        for chunk in chunks(extent, updates):
            shape = (chunk.stop - chunk.start, *extent.shape.dims)
            direction = torch.empty(shape, dtype=extent.dtype)
            for tile in chunk.tiles:
                part = direction[tile.start - chunk.start : tile.stop - chunk.start]
                region = tile.plan.region(directions[tile.record])
                part.copy_(region.reshape(part.shape))
            apply_(direction, chunk, updates, Scratch(), scale=scale, gate=gate)


def one_step(
    one: ParameterRecord, direction: Tensor, gate: Tensor | None = None, **asked: float
) -> None:
    apply_all({one: update(**asked)}, {one: direction}, gate=gate)


@pytest.mark.parametrize("gate", [None, ONE])
def test_each_parameter_has_its_learning_rate_and_decay(gate: Tensor | None) -> None:
    records = [record(index, 2, 3) for index in range(4)]
    before = [fill(one, seed=one.index) for one in records]
    directions = {one: values(one, seed=9 + one.index) for one in records}
    rates = [(0.1, 0.0), (0.2, 0.5), (0.1, 0.5), (0.0, 0.5)]
    updates = {one: update(lr, decay) for one, (lr, decay) in zip(records, rates, strict=True)}
    apply_all(updates, directions, scale=1.5, gate=gate)
    for one, old, (lr, decay) in zip(records, before, rates, strict=True):
        wanted = (old - lr * 1.5 * directions[one]) * (1 - lr * decay)
        torch.testing.assert_close(one.parameter.detach(), wanted)


@pytest.mark.parametrize(("lr", "decay"), [(-0.1, 0.5), (2.0, 0.5), (3.0, 0.5), (0.0, 0.5)])
@pytest.mark.parametrize("transposed", [False, True])
def test_rates_below_zero_and_decays_of_all_there_is(
    lr: float, decay: float, transposed: bool
) -> None:
    one = record(0, 4, 3)
    if transposed:
        one.parameter = torch.zeros(3, 4).mT.requires_grad_()
    before, direction = fill(one), values(one, 1)
    one_step(one, direction, lr=lr, weight_decay=decay)
    wanted = (before - lr * direction) * (1 - lr * decay)
    torch.testing.assert_close(one.parameter.detach(), wanted)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_closed_gate_leaves_every_bit(dtype: torch.dtype) -> None:
    one = record(0, 5, 3, dtype=dtype)
    before = fill(one)
    one_step(one, values(one, 1), gate=ZERO, weight_decay=0.1)
    assert torch.equal(one.parameter, before)


def test_a_parameter_of_several_tiles_is_updated_as_a_whole() -> None:
    one = two_tiles(0)
    before, direction = fill(one), values(one, 1)
    one_step(one, direction, weight_decay=0.1)
    torch.testing.assert_close(one.parameter.detach(), (before - 0.1 * direction) * 0.99)


def channels_last() -> ParameterRecord:
    """A convolution stored as (out 2, height 2, width 2, in 3), a block of (2, 3, 4)."""
    plan = TilePlan(block(2, 3, 4), 1, permutation=(0, 3, 1, 2))
    return record(0, 2, 2, 2, 3, tiles=[plan])


def test_a_permuted_parameter_gets_its_own_elements() -> None:
    one = channels_last()
    before, direction = fill(one), values(one, 1)
    one_step(one, direction)
    torch.testing.assert_close(one.parameter.detach(), before - 0.1 * direction)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_weights_are_computed_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    """Update and decay vanish if each is rounded, and together they do not."""
    step = torch.finfo(dtype).eps / 2  # between one and the next number below it
    one = record(0, 2, 2, dtype=dtype)
    one.parameter.fill_(1)
    one_step(one, torch.full((2, 2), 0.4 * step), lr=1.0, weight_decay=0.4 * step)
    assert one.parameter.tolist() == [[1 - step] * 2] * 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_result_is_the_nearest_number_of_the_dtype(dtype: torch.dtype) -> None:
    one = record(0, 5, 3, dtype=dtype)
    before, direction = fill(one), values(one, 1)
    one_step(one, direction, weight_decay=0.1)
    exact = (before.double() - 0.1 * direction.double()) * 0.99
    assert one.parameter.dtype == dtype
    tolerance = 4e-7 if dtype == torch.float32 else 1e-12 if dtype == torch.float64 else None
    if tolerance is None:
        difference = (one.parameter.double() - exact).abs()
        assert torch.all(difference <= 0.501 * torch.finfo(dtype).eps * exact.abs() + 1e-7)
    else:
        torch.testing.assert_close(one.parameter.double(), exact, rtol=tolerance, atol=tolerance)


def test_dtypes_of_one_stack_are_rounded_each_by_itself() -> None:
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.float32]
    records = [record(index, 2, 3, dtype=dtype) for index, dtype in enumerate(dtypes)]
    before = [fill(one, one.index).float() for one in records]
    directions = {one: values(one, seed=9) for one in records}
    apply_all({one: update() for one in records}, directions)
    for one, old in zip(records, before, strict=True):
        wanted = (old - 0.1 * directions[one]).to(one.dtype)
        torch.testing.assert_close(one.parameter.detach(), wanted)


def stochastic(one: ParameterRecord, change: float = 2.0**-11) -> Tensor:
    """The weights after one stochastically rounded step down from 1."""
    one.parameter.fill_(1)
    direction = torch.full(one.shape, change)
    apply_all({one: update(lr=1.0, stochastic_rounding=True)}, {one: direction})
    return one.parameter.detach().clone()


def test_stochastic_rounding_keeps_small_updates_alive() -> None:
    one = record(0, 100, 100, dtype=torch.bfloat16)
    weights = stochastic(one).float()
    assert set(weights.flatten().tolist()) == {1.0, 1 - 2.0**-8}
    assert float(weights.mean()) == pytest.approx(1 - 2.0**-11, abs=5 * 2.0**-8 * 0.33 / 100)
    one.parameter.fill_(1)
    one_step(one, torch.full((100, 100), 2.0**-11), lr=1.0)
    assert torch.all(one.parameter == 1), "lost by rounding to the nearest"


def test_the_noise_depends_on_parameter_and_step_and_nothing_else() -> None:
    bf16 = torch.bfloat16
    first = stochastic(record(0, 20, 20, dtype=bf16, steps=4))
    assert torch.equal(first, stochastic(record(0, 20, 20, dtype=bf16, steps=4)))
    for other in (
        record(1, 20, 20, dtype=bf16, steps=4),
        record(0, 20, 20, dtype=bf16, steps=5),
        record(0, 20, 20, dtype=bf16, steps=4, begun=False),
    ):
        assert not torch.equal(first, stochastic(other))


def test_the_noise_differs_between_the_tiles_of_a_parameter() -> None:
    tiles = [
        TilePlan(block(20, 20), 1, (slice(20 * n, 20 * n + 20), slice(0, 20)), ordinal=n)
        for n in range(2)
    ]
    weights = stochastic(record(0, 40, 20, tiles=tiles, dtype=torch.bfloat16))
    assert not torch.equal(weights[:20], weights[20:])


@pytest.mark.parametrize("blocks", [1, 2])
def test_chunking_changes_no_bit(monkeypatch: pytest.MonkeyPatch, blocks: int) -> None:
    def run() -> list[Tensor]:
        records = [record(index, 9, 9, dtype=torch.bfloat16) for index in range(6)]
        for one in records:
            fill(one, one.index)
        updates = {one: update(stochastic_rounding=True, weight_decay=0.1) for one in records}
        apply_all(updates, {one: values(one, 7) for one in records})
        return [one.parameter.detach().clone() for one in records]

    together = run()
    monkeypatch.setattr(extents_module, "CHUNK_BYTES", 4 * 81 * blocks)
    assert all(torch.equal(a, b) for a, b in zip(together, run(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_stochastic_rounding_is_for_bfloat16_only(dtype: torch.dtype) -> None:
    one = record(0, 20, 20, dtype=dtype)
    weights = stochastic(one, change=1e-4)
    assert len(set(weights.flatten().tolist())) == 1


def with_gradient(one: ParameterRecord, seed: int) -> Tensor:
    one.parameter.grad = values(one, seed).to(one.dtype)
    return one.parameter.grad.clone()


def dirty_scratch() -> Scratch:
    """Scratch memory in which nothing is finite."""
    scratch = Scratch()
    for dtype in (torch.float32, torch.float64):
        scratch.take("gradient", (1000,), dtype, torch.device("cpu")).fill_(math.nan)
    return scratch


@pytest.mark.parametrize("maximize", [False, True])
def test_gradients_are_gathered_into_the_state_dtype(maximize: bool) -> None:
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    records = [record(index, 2, 3, dtype=dtype) for index, dtype in enumerate(dtypes)]
    given = [with_gradient(one, one.index) for one in records]
    out = gather(chunk_of(*records, maximize=maximize), dirty_scratch(), None)
    wanted = torch.stack([gradient.float() for gradient in given])
    assert out.dtype == torch.float32
    assert torch.equal(out, -wanted if maximize else wanted)
    for one, gradient in zip(records, given, strict=True):
        assert torch.equal(one.parameter.grad, gradient), "the gradient is the user's"


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("gate", [None, ONE])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_lone_gradient_is_gathered_like_the_others(
    dtype: torch.dtype, gate: Tensor | None, maximize: bool
) -> None:
    one = record(0, 3, 2, 3, batch=1, dtype=dtype)
    given = with_gradient(one, 1)
    out = gather(chunk_of(one, maximize=maximize), dirty_scratch(), gate)
    assert out.shape == (3, 2, 3)
    assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(out, (-given if maximize else given).to(out.dtype))
    assert torch.equal(one.parameter.grad, given), "the gradient is the user's"


def test_a_chunk_in_the_middle_gathers_its_own_gradients() -> None:
    records = [record(index, 2, 3) for index in range(6)]
    given = [with_gradient(one, one.index) for one in records]
    extent, scratch = extent_of(*records), dirty_scratch()
    asked = {one: update(eps=float(one.index // 2)) for one in records}
    for number, chunk in enumerate(chunks(extent, asked)):
        out = gather(chunk, scratch, None)
        assert torch.equal(out, torch.stack(given[2 * number : 2 * number + 2]))


def test_a_gradient_that_vanished_is_an_error() -> None:
    records = [record(index, 2, 3) for index in range(2)]
    with_gradient(records[0], 0)
    with pytest.raises(RuntimeError, match="a gradient vanished"):
        gather(chunk_of(*records), Scratch(), None)


def test_a_lone_gradient_that_fits_is_not_copied() -> None:
    one, cut = record(0, 2, 3), two_tiles(1)
    for whole in (one, cut):
        with_gradient(whole, 1)
    assert gather(chunk_of(one), Scratch(), None).data_ptr() == one.parameter.grad.data_ptr()
    extents, updates = admitted(cut), {cut: update()}
    below = [next(chunks(extent, updates)) for (extent,) in extents.values()][1]
    found = gather(below, Scratch(), None)
    assert found.data_ptr() == cut.parameter.grad[4:].data_ptr()
    assert torch.equal(found[0], cut.parameter.grad[4:])


def test_a_lone_gradient_of_another_layout_is_gathered_in_order() -> None:
    one = record(0, 2, 3)
    one.parameter.grad = values(record(0, 3, 2), 1).T
    assert not one.parameter.grad.is_contiguous()
    assert torch.equal(gather(chunk_of(one), dirty_scratch(), None)[0], one.parameter.grad)


def test_a_permuted_gradient_is_gathered_in_the_order_of_the_block() -> None:
    one = channels_last()
    given = with_gradient(one, 1)
    out = gather(chunk_of(one), dirty_scratch(), None)
    assert out.shape == (1, 2, 3, 4)
    assert torch.equal(out[0].view(2, 3, 2, 2), given.permute(0, 3, 1, 2))


@pytest.mark.parametrize("count", [1, 2])
def test_behind_a_closed_gate_nothing_non_finite_is_gathered(count: int) -> None:
    records = [record(index, 2, 3) for index in range(count)]
    for one in records:
        with_gradient(one, one.index)
        one.parameter.grad[0, 0] = math.nan
        one.parameter.grad[1, 1] = math.inf
    out = gather(chunk_of(*records, maximize=True), dirty_scratch(), ZERO)
    assert out.shape == (count, 2, 3)
    assert not out.any()


def test_normalizing_gives_every_block_a_root_mean_square_of_one() -> None:
    records = [record(0, 2, 3), record(1, 3, 2, 3, batch=1)]
    direction = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(0))
    direction *= torch.tensor([1e-12, 1.0, 30.0, 1e12]).view(4, 1, 1)
    before = direction.clone()
    normalize_(direction, chunk_of(*records))
    roots = direction.square().mean((1, 2)).sqrt()
    torch.testing.assert_close(roots, torch.ones(4))
    scales = before.square().mean((1, 2), keepdim=True).sqrt()
    torch.testing.assert_close(direction * scales, before)


def test_normalizing_under_the_adamw_rule_is_by_parameter() -> None:
    records = [record(0, 3, rule=ADAMW), record(1, 5, rule=ADAMW), record(2, rule=ADAMW)]
    direction = torch.tensor([1.0, 2, 3, 10, 20, 30, 40, 50, -7])
    wanted = [part / part.square().mean().sqrt() for part in direction.clone().split([3, 5, 1])]
    normalize_(direction, chunk_of(*records))
    torch.testing.assert_close(direction, torch.cat(wanted))


def test_normalizing_a_chunk_in_the_middle() -> None:
    records = [record(index, 3, rule=ADAMW) for index in range(6)]
    asked = {one: update(eps=float(one.index // 2)) for one in records}
    chunk = list(chunks(extent_of(*records), asked))[1]
    direction = torch.tensor([1.0, 2, 3, 40, 50, 60])
    wanted = [part / part.square().mean().sqrt() for part in direction.clone().split(3)]
    normalize_(direction, chunk)
    torch.testing.assert_close(direction, torch.cat(wanted))


def test_normalizing_nothing_gives_nothing() -> None:
    one = record(0, 2, 3)
    direction = torch.zeros(1, 2, 3)
    normalize_(direction, chunk_of(one))
    assert not direction.any()
    assert extent_of(one).blocks == 1
