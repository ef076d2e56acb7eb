"""New bases start their way to the device behind the backward pass, and land between two steps."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional

from asteria import SOAP, RuntimeConfig
from tests.support.links import CheckedLink
from tests.support.training import Bits, assert_same_bits, weights

STEPS = 14
Backward = Callable[[nn.Module, int], None]


class Twice(nn.Module):
    """A model whose inner weight is used twice."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.inner = nn.Parameter(torch.randn(6, 6, generator=generator))
        self.outer = nn.Parameter(torch.randn(6, 3, generator=generator))
        self.bias = nn.Parameter(torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = functional.silu(functional.silu(x @ self.inner) @ self.inner)
        return hidden @ self.outer + self.bias


def loss(model: nn.Module, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(8, 6, generator=generator), torch.randn(8, 3, generator=generator)
    return functional.mse_loss(model(x), y)


def plain(model: nn.Module, step: int) -> None:
    loss(model, step).backward()


def accumulated(model: nn.Module, step: int) -> None:
    for part in range(3):
        (loss(model, 10 * step + part) / 3).backward()


def by_hand(model: nn.Module, step: int) -> None:
    params = [p for p in model.parameters() if p.requires_grad]
    for p, gradient in zip(params, torch.autograd.grad(loss(model, step), params), strict=True):
        p.grad = gradient


def frozen_in_the_middle(model: nn.Module, step: int) -> None:
    model.get_parameter("outer").requires_grad_(not 4 <= step < 9)
    loss(model, step).backward()


def with_a_missing_gradient(model: nn.Module, step: int) -> None:
    loss(model, step).backward()
    if step % 3 == 0:
        model.get_parameter("inner").grad = None


def run(backward: Backward, *, to_none: bool = True, link: CheckedLink | None = None) -> Bits:
    model = Twice()
    with SOAP(model.parameters(), lr=0.02, precondition_frequency=3) as optimizer:
        for step in range(STEPS):
            backward(model, step)
            if link is not None:
                link.stepping = True
            optimizer.step()
            if link is not None:
                link.stepping = False
            optimizer.zero_grad(set_to_none=to_none)
        assert optimizer.stats().installs > 10
    return weights(model.parameters())


@pytest.fixture
def link(monkeypatch: pytest.MonkeyPatch) -> CheckedLink:
    link = CheckedLink()
    monkeypatch.setattr("asteria.runtime.staging.link_to", lambda device: link)
    return link


PASSES = [plain, accumulated, by_hand, frozen_in_the_middle, with_a_missing_gradient]


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("backward", PASSES)
def test_bits_do_not_depend_on_the_way(
    backward: Backward, to_none: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(backward, to_none=to_none)
    link = CheckedLink()
    monkeypatch.setattr("asteria.runtime.staging.link_to", lambda device: link)
    assert_same_bits(run(backward, to_none=to_none, link=link), expected)


def test_transfers_begin_in_the_backward_pass(link: CheckedLink) -> None:
    model = Twice()
    with SOAP(model.parameters(), lr=0.02, precondition_frequency=3) as optimizer:
        for step in range(STEPS):
            # Wherever the workers are slow, the step itself begins the transfer: so let them end.
            optimizer.state_dict()
            plain(model, step)
            link.stepping = True
            optimizer.step()
            link.stepping = False
            optimizer.zero_grad()
    assert link.staged_early > 0


def test_a_compiled_model_announces_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def compiled_run(link: CheckedLink) -> Bits:
        model = Twice()
        compiled = torch.compile(model, backend="aot_eager")
        with SOAP(model.parameters(), lr=0.02, precondition_frequency=3) as optimizer:
            for step in range(STEPS):
                optimizer.state_dict()
                loss(compiled, step).backward()
                link.stepping = True
                optimizer.step()
                link.stepping = False
                optimizer.zero_grad()
        return weights(model.parameters())

    expected = compiled_run(CheckedLink())
    link = CheckedLink()
    monkeypatch.setattr("asteria.runtime.staging.link_to", lambda device: link)
    assert_same_bits(compiled_run(link), expected)
    assert link.staged_early > 0


def test_no_hook_fires_for_gradients_set_by_hand(link: CheckedLink) -> None:
    run(by_hand, link=link)
    assert link.staged_early == 0


def test_hooks_are_set_only_where_something_travels() -> None:
    model = Twice()
    with SOAP(model.parameters(), lr=0.02) as optimizer:
        plain(model, 0)
        optimizer.step()
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_hooks_end_with_the_state(link: CheckedLink) -> None:
    model = Twice()
    optimizer = SOAP(model.parameters(), lr=0.02)
    plain(model, 0)
    optimizer.step()
    assert model.inner._post_accumulate_grad_hooks
    assert not model.bias._post_accumulate_grad_hooks
    del optimizer.state[model.inner]
    optimizer.step()  # begins afresh, and watches again
    assert len(model.inner._post_accumulate_grad_hooks) == 1
    optimizer.close()
    del optimizer
    assert not model.inner._post_accumulate_grad_hooks


def test_ready_installs_are_staged_as_soon_as_they_are_done(link: CheckedLink) -> None:
    model = Twice()
    runtime = RuntimeConfig(install="ready", staleness=5)
    with SOAP(model.parameters(), lr=0.02, precondition_frequency=3, runtime=runtime) as optimizer:
        for step in range(STEPS):
            optimizer.state_dict()
            plain(model, step)
            link.stepping = True
            optimizer.step()
            link.stepping = False
        ages = optimizer.stats().staleness["6x6"]
    assert link.staged_early > 0
    assert max(ages) <= 3 + 5
