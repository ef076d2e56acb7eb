"""State comes near while the backward pass goes on; nothing depends on whether it does."""

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from asteria import SOAP
from asteria.optim.optimizer import SecondOrderOptimizer
from asteria.runtime import foresight
from asteria.store.cell import Cell
from tests.support.execution import ManualExecutor, directed
from tests.support.tiers import (
    ARRANGEMENTS,
    CheckedLane,
    CheckedUpload,
    Stores,
    arranged,
    cells,
    limit_extents,
)
from tests.support.training import assert_same_bits, everything

WIDTH = 8


class Model(nn.Module):
    """Three layers whose gradients come one after the other, the last layer's first."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layers = nn.ParameterList(
            nn.Parameter(torch.randn(WIDTH, WIDTH, generator=generator) / 4) for _ in range(3)
        )

    def loss(self, step: int, skip: int | None = None) -> Tensor:
        x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(step + 1))
        for number, layer in enumerate(self.layers):
            if number != skip:
                x = torch.tanh(x @ layer)
        return x.square().sum()


def built(
    monkeypatch: pytest.MonkeyPatch, place: str = "disk"
) -> tuple[Model, SecondOrderOptimizer, Stores]:
    limit_extents(monkeypatch, 1)
    model = Model()
    optimizer = SOAP(model.parameters(), shampoo_beta=0.5)
    stores = arranged(optimizer, ARRANGEMENTS[place])
    for step in range(3):
        one_step(model, optimizer, step)
    for extent in optimizer._engine._all():
        extent.door._near.budget_bytes = None
        extent.door.flush()
    return model, optimizer, stores


def one_step(model: Model, optimizer: SecondOrderOptimizer, step: int) -> None:
    optimizer.zero_grad()
    model.loss(step).backward()
    optimizer.step()


def near(optimizer: SecondOrderOptimizer) -> list[Cell]:
    return [cell for cell in cells(optimizer) if cell.near is not None]


@pytest.mark.parametrize("place", ["disk", "pinned", "disk behind a device"])
def test_the_first_gradient_brings_state_near(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer, _ = built(monkeypatch, place)
    seen: list[int] = []
    # The last layer's gradient comes first; by the next one something is on its way.
    model.layers[0].register_hook(lambda _: seen.append(len(near(optimizer))))
    optimizer.zero_grad()
    assert not near(optimizer)
    model.loss(3).backward()
    assert seen[0] > 0


def test_it_is_brought_in_the_order_of_the_step_as_far_as_there_is_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, optimizer, stores = built(monkeypatch)
    first = optimizer._engine._all()[0]
    first.door._near.trim()
    first.door._near.budget_bytes = sum(cell.nbytes for cell in first.cells.values())
    optimizer.zero_grad()
    model.loss(3).backward()
    assert near(optimizer)
    assert set(near(optimizer)) <= set(first.cells.values())
    gets = stores.tier.gets
    before = len(near(optimizer))
    first.acquire(list(first.cells))
    first.release(list(first.cells), [])
    assert stores.tier.gets - gets <= len(cells(optimizer)) - before


def test_accumulation_brings_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer, stores = built(monkeypatch)
    optimizer.zero_grad()
    model.loss(3).backward()
    gets = stores.tier.gets
    assert near(optimizer)
    for part in range(3):
        model.loss(4 + part).backward()
    assert stores.tier.gets == gets


def test_without_a_gradient_nothing_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer, stores = built(monkeypatch)
    gets = stores.tier.gets
    optimizer.zero_grad()
    with torch.no_grad():
        model.loss(3)
    torch.autograd.grad(model.loss(3), list(model.parameters()))
    assert (stores.tier.gets, near(optimizer)) == (gets, [])


def test_each_step_is_announced_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer, _ = built(monkeypatch)
    for step in range(3, 8):
        optimizer.zero_grad()
        for extent in optimizer._engine._all():
            extent.door.flush()
        assert not near(optimizer)
        model.loss(step).backward()
        assert near(optimizer)
        optimizer.step()


def test_the_hooks_go_with_the_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer, stores = built(monkeypatch)
    optimizer.state.clear()
    for parameter in model.parameters():
        parameter.grad = None
    one_step(model, optimizer, 3)
    hooks = [parameter._post_accumulate_grad_hooks for parameter in model.parameters()]  # type: ignore[attr-defined]
    assert all(len(found) == 1 for found in hooks)
    del optimizer, stores
    assert not any(hooks)


def test_gradients_that_are_absent_or_surprising_change_no_bit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    finals = []
    for place in (None, "disk", "all three"):
        limit_extents(monkeypatch, 1)
        model = Model()
        optimizer = SOAP(model.parameters(), shampoo_beta=0.5)
        if place is None:
            directed(optimizer, ManualExecutor())
        else:
            arranged(optimizer, ARRANGEMENTS[place])
        for step in range(24):
            optimizer.zero_grad()
            model.loss(step, skip=step % 4).backward()
            if step % 3 == 0:
                model.loss(step + 100).backward()
            if step % 5:
                optimizer.step()
        finals.append(everything(optimizer))
    assert_same_bits(finals[1], finals[0])
    assert_same_bits(finals[2], finals[0])


def test_what_a_hook_begins_belongs_to_the_stream_that_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A backward pass may run on another one, which does not wait for the last step's work."""
    now = ["the step's"]

    @contextlib.contextmanager
    def on(stream: str) -> Iterator[None]:
        now.append(stream)
        yield
        now.pop()

    monkeypatch.setattr(foresight, "stream_of", lambda device: now[-1])
    monkeypatch.setattr(foresight, "current_stream", on)
    model, optimizer, stores = built(monkeypatch, "pinned")
    seen = []
    upload = CheckedLane.upload

    def watched(lane: CheckedLane, host: Tensor, target: Tensor) -> CheckedUpload:
        seen.append(now[-1])
        return upload(lane, host, target)

    monkeypatch.setattr(CheckedLane, "upload", watched)
    optimizer.zero_grad()
    loss = model.loss(3)
    now[0] = "the backward pass's"
    loss.backward()
    assert set(seen) == {"the step's"}
