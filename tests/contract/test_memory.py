"""Temporary memory is bounded whatever the model, and nothing grows with the number of steps."""

import gc
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from asteria.optim.optimizer import SecondOrderOptimizer
from tests.support.arms import Arm, over_alone_arms, over_arms
from tests.support.memory import TemporaryMemory, limit_chunks, live_objects
from tests.support.tolerances import SAME_MATH
from tests.support.training import (
    MIXED,
    Shape,
    assert_near,
    clones,
    parameters,
    set_gradients,
    train,
    weights,
)

CHUNK_BYTES = 16 * 1024
BLOCKS = 1000
LAYOUTS = {
    "parameters": {"shapes": [(8, 8)] * BLOCKS, "batch_dims": 0},
    "narrow parameters": {"shapes": [(8, 8)] * 200, "batch_dims": 0},
    "stack": {"shapes": [(BLOCKS, 8, 8)], "batch_dims": 1},
    "stack of stacks": {"shapes": [(BLOCKS // 10, 10, 8, 8)], "batch_dims": 2},
    "vector": {"shapes": [(BLOCKS * 64,)], "batch_dims": 0},
    "large factors": {"shapes": [(32, 2)] * 128, "batch_dims": 0},
    "rows": {"shapes": [(BLOCKS, 64)], "batch_dims": 0, "max_precond_dim": 1},
}
"""Of many times a chunk, in float32 weights or in factors."""


@pytest.fixture
def older_objects_uncounted() -> Iterator[None]:
    """Counting is quick if all that was there before is out of the collector's sight."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def build(
    arm: Arm, layout: str, dtype: torch.dtype
) -> tuple[list[nn.Parameter], SecondOrderOptimizer]:
    options = dict(LAYOUTS[layout])
    params = parameters(options.pop("shapes"), dtype)
    return params, arm([{"params": params, **options}], precondition_frequency=1)


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        ("parameters", torch.float32),
        ("narrow parameters", torch.bfloat16),
        ("stack", torch.float32),
        ("stack of stacks", torch.bfloat16),
        ("vector", torch.bfloat16),
        ("large factors", torch.float32),
        ("rows", torch.float32),
    ],
)
@over_arms
def test_a_thousand_blocks_are_not_stacked_at_once(
    arm: Arm, layout: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit_chunks(monkeypatch, CHUNK_BYTES)
    params, optimizer = build(arm, layout, dtype)
    set_gradients(params, 0)
    optimizer.step()
    # Of the units whose refresh is in flight, which here are all: what the workers work from.
    snapshots = sum(
        t.nbytes
        for entries in optimizer.state.values()
        for key, t in entries.items()
        if arm.is_asynchronous and key.startswith(("factor", "basis"))
    )
    with TemporaryMemory() as memory:
        optimizer.step()
    scratch = [
        buffer.nbytes for buffer in optimizer._engine._stepper._updater._scratch._buffers.values()
    ]
    assert max(scratch) <= CHUNK_BYTES
    assert sum(scratch) <= 3 * CHUNK_BYTES
    assert 0 < memory.largest_bytes <= CHUNK_BYTES
    assert memory.peak_bytes <= 8 * CHUNK_BYTES + snapshots


@pytest.mark.parametrize("shapes", [[(8, 8)] * 20, [(20, 8, 8)]], ids=["parameters", "stack"])
@over_alone_arms
def test_results_do_not_depend_on_the_chunks(
    arm: Arm, shapes: list[Shape], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = parameters(shapes, torch.float64), parameters(shapes, torch.float64)
    start = weights(whole)
    train(arm([{"params": whole, "batch_dims": len(shapes[0]) - 2}]), range(5))
    limit_chunks(monkeypatch, 3 * 8 * 64)
    train(arm([{"params": cut, "batch_dims": len(shapes[0]) - 2}]), range(5))
    assert_near(weights(cut), weights(whole), SAME_MATH, torch.float64, start)


@pytest.mark.usefixtures("older_objects_uncounted")
@over_arms
def test_no_object_is_left_behind_by_a_step(arm: Arm) -> None:
    params = parameters([(3, 3), (4,), (2, 2, 2)], torch.bfloat16)
    optimizer = arm(params, stochastic_rounding=True, shampoo_beta=0.5)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    counts: list[tuple[int, int]] = []
    # What happens for the first time, such as a wait for a slow worker, may leave a counter.
    while len(counts) < 3 or (counts[-1] != counts[-2] and len(counts) < 6):
        for step in range(90 if counts else 31):  # one refresh of every unit is in flight then
            set_gradients(params, step)
            optimizer.step()
            scheduler.step()
        optimizer.state_dict()  # waits for the workers: what is in flight holds results only
        optimizer.close()  # nor does a worker that is about to wait hold anything
        counts.append(live_objects())
    assert counts[1][1] == counts[0][1]
    assert counts[-1] == counts[-2]


@over_arms
def test_steady_steps_allocate_no_state(arm: Arm) -> None:
    """State stays where it is: others (a captured graph, a checkpointer) may hold on to it."""
    optimizer = arm(parameters(MIXED))
    train(optimizer, range(2))

    def places() -> list[int]:
        return [
            entries[key].data_ptr()
            for entries in optimizer.state.values()
            for key in entries
            if not key.startswith("shadow")  # what is in flight is made when it is asked for
        ]

    before = places()
    train(optimizer, range(2, 12))
    assert places() == before


@pytest.mark.usefixtures("older_objects_uncounted")
@over_arms
def test_dropped_state_is_freed(arm: Arm) -> None:
    """Also by loading: the state is never held twice for longer than the call."""
    params = parameters(MIXED)
    optimizer = arm(params, shampoo_beta=0.5)
    train(optimizer, range(20))  # grown up: one refresh of every unit is in flight
    saved = optimizer.state_dict()
    _, tensors = live_objects()
    for _ in range(3):
        optimizer.load_state_dict(saved)
        train(optimizer, range(2))
    del saved
    optimizer.state_dict()  # waits for the workers, whose snapshots go
    optimizer.close()
    assert live_objects()[1] <= tensors
    optimizer.state.clear()
    set_gradients(params[:1], 0)
    for p in params[1:]:
        p.grad = None
    optimizer.step()
    assert live_objects()[1] < tensors / 2


@pytest.mark.usefixtures("older_objects_uncounted")
@over_arms
def test_a_dropped_optimizer_leaves_nothing(arm: Arm) -> None:
    params = parameters(MIXED)
    set_gradients(params, 0)
    train(arm(clones(params)), range(2))
    before = live_objects()[1]
    for _ in range(3):
        train(arm(clones(params)), range(2))
    assert live_objects()[1] == before
