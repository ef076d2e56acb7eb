"""A refresh in flight whose worker raised: step() tells of it, everything else goes on."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import asteria
from asteria.optim.optimizer import SecondOrderOptimizer
from asteria.refresh.job import Job
from asteria.runtime import host_refresh
from asteria.runtime.engine import Engine

RUNTIME = asteria.RuntimeConfig(start="eigh")


class AtOnce:
    """An executor that has done every job when `submit` returns."""

    size, deaths = 1, 0

    def submit(self, job: Job[Any]) -> None:
        job.run()

    def wait(self, job: Job[Any]) -> None: ...

    def discard(self, job: Job[Any]) -> None: ...

    def close(self) -> None: ...


def make(parameter: Tensor) -> SecondOrderOptimizer:
    optimizer = asteria.SOAP([parameter], lr=1e-2, precondition_frequency=4, runtime=RUNTIME)
    optimizer._engine = Engine(RUNTIME, executor=AtOnce())
    return optimizer


def steps(optimizer: SecondOrderOptimizer, count: int) -> None:
    for parameter in optimizer.param_groups[0]["params"]:
        for _ in range(count):
            parameter.grad = torch.cos(torch.arange(12.0) + parameter.sum().item()).view(3, 4)
            optimizer.step()


@pytest.fixture
def failed(monkeypatch: pytest.MonkeyPatch) -> SecondOrderOptimizer:
    """After 5 steps, with the refresh launched at step 4 in flight and failed."""

    def raises(*_: object, **__: object) -> None:
        raise ValueError("a worker fault")

    torch.manual_seed(0)
    optimizer = make(torch.randn(3, 4).requires_grad_())
    with monkeypatch.context() as patch:
        patch.setattr(host_refresh, "verified_refresh", raises)
        steps(optimizer, 5)
    assert optimizer.stats().in_flight == 1
    return optimizer


def _loaded(optimizer: SecondOrderOptimizer) -> SecondOrderOptimizer:
    (parameter,) = optimizer.param_groups[0]["params"]
    loaded = make(parameter.detach().clone().requires_grad_())
    loaded.load_state_dict(optimizer.state_dict())
    return loaded


def _unpickled(optimizer: SecondOrderOptimizer) -> SecondOrderOptimizer:
    copied: SecondOrderOptimizer = pickle.loads(pickle.dumps(optimizer))
    return copied


@pytest.mark.parametrize("duplicate", [_loaded, _unpickled, copy.deepcopy])
def test_it_keeps_nobody_from_saving_the_rest(
    failed: SecondOrderOptimizer,
    duplicate: Callable[[SecondOrderOptimizer], SecondOrderOptimizer],
) -> None:
    other = duplicate(failed)
    assert other.stats().in_flight == 0
    steps(other, 12)
    assert other.stats().failed_refreshes == 0
    other.close()
    # Only a step takes it out, and tells of it.
    with pytest.raises(ValueError, match="a worker fault"):
        steps(failed, 3)
    assert failed.stats().failures == {"worker raised": 1}
    assert failed.stats().in_flight == 0
    steps(failed, 4)
