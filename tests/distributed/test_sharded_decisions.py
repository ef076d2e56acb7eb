"""What ranks decide together: bad gradients, failures, parameters that come later."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from asteria.errors import CoherenceError, ConfigError, NonFiniteGradientError, StoreError
from asteria.runtime.engine import Engine
from asteria.runtime.sharded import Together
from asteria.runtime.stepper import Stepper
from tests.distributed.fans import Arrays, Parts, Run, build, differing
from tests.support.processes import gather

RANKS = 2
BAD = "layers.1.weight"
"""Its gradient is spoilt, on one rank."""


class Failing(Stepper):
    """Cannot reach a disk in the middle of one step."""

    fails = True

    def step(self, work: Any, *rest: Any) -> None:
        """See `Stepper`."""
        if self.fails:
            self.fails = False
            super().step(work[: len(work) // 2], *rest)
            raise StoreError("the disk is gone")
        super().step(work, *rest)


class Gated(Engine):
    """Decides as on an accelerator, where the host does not wait for the gradients."""

    def accepts(
        self, names: Any, gradients: Any, *, ready: bool, together: Together | None = None
    ) -> Any:
        """See `Engine`."""
        if not ready:
            return super().accepts(names, gradients, ready=ready, together=together)
        self._counters.steps += 1
        self._collect_verdicts(wait=True)
        return True, self._guard.gate(gradients, names, together)


def spoil(run: Run, rank: int) -> None:
    gradient = run.model.get_parameter(BAD).grad
    assert gradient is not None
    if rank == 1:
        gradient.to_local()[0, 0] = torch.inf  # type: ignore[attr-defined]


def message(run: Run) -> str:
    try:
        run.optimizer.step()
    except (CoherenceError, NonFiniteGradientError, StoreError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def skipping(rank: int, *, gated: bool) -> tuple[int, Parts]:
    """Skipped steps of a run in which one is bad, and its weights."""
    run = Run("SOAP", (RANKS,), runtime={"nonfinite": "skip"})
    if gated:
        run.optimizer._engine.__class__ = Gated
    for step in range(6):
        run.backward(step)
        if step == 2:
            spoil(run, rank)
        run.optimizer.step()
    return run.optimizer.stats().skipped_steps, run.parts()


def bad_gradient(rank: int) -> Iterator[tuple[str, Any]]:
    run = Run("SOAP", (RANKS,))
    run.train(range(3))
    before = run.parts()
    run.backward(3)
    spoil(run, rank)
    yield "raise", message(run)
    yield "untouched", all((before[n][1] == values).all() for n, (_, values) in run.parts().items())
    run.train(range(3, 6))
    yield "then", run.parts()
    yield "skipped", skipping(rank, gated=False)
    yield "gated", skipping(rank, gated=True)


def absent_gradient(rank: int) -> Iterator[tuple[str, Any]]:
    run = Run("SOAP", (RANKS,))
    run.train(range(2))
    run.backward(2)
    if rank == 1:
        run.model.get_parameter(BAD).grad = None
    yield "torn", message(run)


def failure(rank: int) -> Iterator[tuple[str, Any]]:
    run = Run("KLSOAP", (RANKS,))
    run.train(range(3))
    run.backward(3)
    before = run.parts()
    if rank == 1:
        run.optimizer._engine._stepper.__class__ = Failing
    yield "failed", message(run)
    yield "weights", all((before[n][1] == values).all() for n, (_, values) in run.parts().items())
    run.optimizer.step()
    run.train(range(4, 7))
    yield "completed", run.parts()


def latecomers(run: Run) -> None:
    """One layer is frozen at first, and another begins afresh, so that owners change."""
    late = run.model.get_submodule("layers.0").requires_grad_(False)
    run.train(range(5))
    late.requires_grad_(True)
    run.train(range(5, 9))
    run.optimizer.state.pop(run.model.get_parameter("layers.2.weight"))
    run.train(range(9, 12))


def everything(rank: int) -> dict[str, Any]:
    found = dict(bad_gradient(rank)) | dict(absent_gradient(rank)) | dict(failure(rank))
    run = Run("SOAP", (RANKS,))
    latecomers(run)
    found["late"] = run.parts()
    run.backward(12)
    dist.destroy_process_group()
    found["destroyed"] = message(run)
    try:
        build("SOAP", run.model.named_parameters(), {})
    except ConfigError as error:
        found["new"] = str(error)
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    store: Path = tmp_path_factory.mktemp("ranks") / "store"
    return list(gather(RANKS, store, everything))


def whole(name: str, steps: list[int]) -> Arrays:
    run = Run(name)
    run.train(steps)
    return run.arrays()


def check(parts: Parts, wanted: Arrays) -> None:
    assert not differing(parts, wanted)


def test_a_bad_gradient_on_one_rank_is_told_by_all(results: list[dict[str, Any]]) -> None:
    wanted = whole("SOAP", [0, 1, 2, 3, 4, 5])
    for found in results:
        assert found["raise"].startswith(f"NonFiniteGradientError: the gradient of {BAD} holds")
        assert found["untouched"]
        check(found["then"], wanted)


def test_a_bad_gradient_on_one_rank_is_skipped_by_all(results: list[dict[str, Any]]) -> None:
    wanted = whole("SOAP", [0, 1, 3, 4, 5])
    for found in results:
        assert found["skipped"][0] == 1
        check(found["skipped"][1], wanted)


def test_a_gate_on_the_device_closes_on_all_ranks(results: list[dict[str, Any]]) -> None:
    run = Run("SOAP", runtime={"nonfinite": "skip"})
    run.optimizer._engine.__class__ = Gated
    for step in range(6):
        run.backward(step)
        if step == 2:
            run.model.get_parameter(BAD).grad[4, 0] = torch.inf  # type: ignore[index]
        run.optimizer.step()
    for found in results:
        assert found["gated"][0] == run.optimizer.stats().skipped_steps == 1
        check(found["gated"][1], run.arrays())


def test_a_gradient_that_only_some_ranks_have_is_refused_by_all(
    results: list[dict[str, Any]],
) -> None:
    for found in results:
        assert found["torn"].startswith("CoherenceError: ")
        assert "has a gradient on some of the ranks 0, 1 and none on others" in found["torn"]
    assert BAD in results[0]["torn"]


def test_a_step_that_failed_on_one_rank_is_completed_by_the_next_call(
    results: list[dict[str, Any]],
) -> None:
    assert results[1]["failed"] == "StoreError: the disk is gone"
    assert results[0]["failed"].startswith("CoherenceError: rank 1 could not complete its part")
    for found in results:
        assert found["weights"], "no sharded weight is changed before all are done"
        check(found["completed"], whole("KLSOAP", list(range(7))))


def test_without_a_process_group_nothing_is_stepped(results: list[dict[str, Any]]) -> None:
    for found in results:
        assert found["destroyed"].startswith("CoherenceError: ranks 0, 1 share parameters")
        assert ": its shards are on " in found["new"]


def test_parameters_that_come_later_and_go(results: list[dict[str, Any]]) -> None:
    run = Run("SOAP")
    latecomers(run)
    for found in results:
        check(found["late"], run.arrays())
