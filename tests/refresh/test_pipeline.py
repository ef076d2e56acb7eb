"""Refreshes in flight: when they land, what waits, and what is dropped. No threads here."""

from collections.abc import Callable

import pytest

from asteria.refresh.job import Job
from asteria.refresh.pipeline import Flight, Pipeline
from tests.support.execution import FakeClock, ManualExecutor

JOB_S = 3.0


class Bench:
    """A pipeline of units that are letters, whose results are their names and versions."""

    def __init__(self, *, staleness: int = 2, ready: bool = False) -> None:
        self.clock, self.staleness = FakeClock(), staleness
        self.workers = ManualExecutor(self.clock, JOB_S)
        self.pipeline: Pipeline[str, str] = Pipeline(self.workers, ready=ready, clock=self.clock)

    def launch(self, unit: str, version: int, *, turned: float = 0.0) -> Flight[str]:
        work: Callable[[], str] = lambda: f"{unit}{version}"  # noqa: E731
        lands = version + self.staleness
        urgency = (lands, -turned)
        return self.pipeline.launch(unit, version, work, lands=lands, urgency=urgency)

    def landing(self, unit: str, steps: int) -> list[str]:
        """Land what is due, as the runtime does."""
        flights = self.pipeline.due(unit, steps)
        for flight in flights:
            self.pipeline.land(unit, flight)
        return [flight.job.outcome() for flight in flights]


@pytest.mark.parametrize("staleness", [1, 2, 5])
@pytest.mark.parametrize("done_after", [0, 1, 3, None])
def test_scheduled_lands_exactly_at_the_bound(staleness: int, done_after: int | None) -> None:
    bench = Bench(staleness=staleness)
    bench.launch("a", 10)
    for steps in range(10, 10 + staleness):
        if done_after is not None and steps >= 10 + done_after:
            bench.workers.run_all()
        assert bench.landing("a", steps) == []
    assert bench.landing("a", 10 + staleness) == ["a10"]
    assert len(bench.pipeline) == 0
    assert bench.pipeline.waits.count == (done_after is None or done_after >= staleness)


def test_ready_lands_when_done_and_at_the_bound_at_the_latest() -> None:
    bench = Bench(staleness=3, ready=True)
    bench.launch("a", 4)
    assert bench.landing("a", 4) == []
    assert bench.landing("a", 5) == []
    bench.workers.run_all()
    assert bench.landing("a", 6) == ["a4"]
    bench.launch("a", 7)
    for steps in range(7, 10):
        assert bench.landing("a", steps) == []
    assert bench.landing("a", 10) == ["a7"]
    assert bench.pipeline.waits.count == 1


@pytest.mark.parametrize("ready", [False, True])
def test_several_flights_of_a_unit_land_in_order(ready: bool) -> None:
    """None is overtaken by a newer one that is done before."""
    bench = Bench(staleness=4, ready=ready)
    flights = [bench.launch("a", version) for version in (1, 2, 3)]
    assert bench.pipeline.flights("a") == tuple(flights)
    for flight in flights[1:]:
        bench.workers.queue.remove(flight.job)
        flight.job.run()
    assert bench.landing("a", 4) == []
    assert bench.landing("a", 5) == (["a1", "a2", "a3"] if ready else ["a1"])
    assert bench.landing("a", 7) == ([] if ready else ["a2", "a3"])


def test_units_do_not_concern_each_other() -> None:
    bench = Bench()
    bench.launch("a", 1)
    bench.launch("b", 3)
    assert bench.pipeline.units() == ["a", "b"]
    assert bench.landing("a", 3) == ["a1"]
    assert bench.landing("b", 3) == []
    assert bench.pipeline.units() == ["b"]
    assert bench.pipeline.flights("a") == ()
    assert bench.landing("a", 100) == []


def test_an_overdue_unit_lands_when_it_is_asked_for() -> None:
    """Its parameter may have had no gradient for long."""
    bench = Bench()
    bench.launch("a", 1)
    bench.launch("a", 2)
    assert bench.landing("a", 50) == ["a1", "a2"]


def test_launching_begins_nothing_and_waits_for_nothing() -> None:
    bench = Bench()
    flight = bench.launch("a", 1)
    assert not flight.job.done
    assert bench.workers.submitted == [flight.job]
    assert flight.job.name == "refresh of a at step 1"
    assert bench.pipeline.waits.count == 0


def test_waits_are_counted_and_timed_and_only_those_at_the_bound() -> None:
    bench = Bench()
    for unit in "abc":
        bench.launch(unit, 1)
    bench.workers.run_next()
    for unit in "abc":
        bench.landing(unit, 2)
    for unit in "abc":
        bench.landing(unit, 3)
    waits = bench.pipeline.waits
    assert (waits.count, waits.seconds) == (2, 2 * JOB_S)
    assert [job.name[11] for job in bench.workers.waited_for] == ["b", "c"]
    bench.launch("a", 4)
    bench.pipeline.finished("a")
    assert (waits.count, waits.seconds) == (2, 2 * JOB_S), "that was nobody's step"


def test_a_wait_that_is_interrupted_counts_too() -> None:
    class Interrupted(ManualExecutor):
        def wait(self, job: Job[object]) -> None:
            clock.advance(1.5)
            raise KeyboardInterrupt

    clock = FakeClock()
    pipeline: Pipeline[str, int] = Pipeline(Interrupted(), ready=False, clock=clock)
    pipeline.launch("a", 1, lambda: 1, lands=2, urgency=())
    with pytest.raises(KeyboardInterrupt):
        pipeline.due("a", 2)
    assert (pipeline.waits.count, pipeline.waits.seconds) == (1, 1.5)
    assert len(pipeline) == 1, "nothing is lost: the next step waits again"


def test_the_overdue_come_first_and_then_what_has_turned_most() -> None:
    bench = Bench()
    for unit, version, turned in (("a", 9, 0.9), ("b", 7, 0.1), ("c", 7, 0.6), ("d", 8, 0.0)):
        bench.launch(unit, version, turned=turned)
    bench.workers.run_all()
    assert [job.name[11] for job in bench.workers.done] == ["c", "b", "d", "a"]


@pytest.mark.parametrize("ready", [False, True])
def test_what_is_ready_is_what_would_land_without_a_wait(ready: bool) -> None:
    bench = Bench(staleness=2, ready=ready)
    first, second = bench.launch("a", 1), bench.launch("a", 2)
    assert bench.pipeline.ready("a", 9) == []
    bench.workers.run_next()
    assert bench.pipeline.ready("a", 2) == ([first] if ready else [])
    assert bench.pipeline.ready("a", 3) == [first]
    bench.workers.run_all()
    assert bench.pipeline.ready("a", 3) == ([first, second] if ready else [first])
    assert bench.pipeline.ready("b", 3) == []
    assert len(bench.pipeline) == 2, "they stay until they land"


def test_finished_waits_for_all_and_lands_nothing() -> None:
    bench = Bench()
    flights = [bench.launch("a", 1), bench.launch("a", 2)]
    assert bench.pipeline.finished("a") == tuple(flights)
    assert all(flight.job.done for flight in flights)
    assert bench.pipeline.flights("a") == tuple(flights)
    assert bench.pipeline.finished("b") == ()


def test_what_is_forgotten_is_discarded_and_its_unit_begins_anew() -> None:
    bench = Bench()
    flights = [bench.launch("a", 1), bench.launch("a", 2), bench.launch("b", 1)]
    bench.pipeline.forget("a")
    bench.pipeline.forget("nobody")
    assert bench.workers.discarded == [flights[0].job, flights[1].job]
    assert bench.landing("a", 10) == []
    assert bench.pipeline.units() == ["b"]
    bench.launch("a", 11)
    assert bench.landing("a", 13) == ["a11"]


def test_one_flight_can_be_cancelled_until_it_has_landed() -> None:
    bench = Bench()
    first, second = bench.launch("a", 1), bench.launch("a", 2)
    bench.pipeline.cancel("a", second)
    assert bench.workers.discarded == [second.job]
    assert bench.landing("a", 9) == ["a1"]
    bench.pipeline.cancel("a", first)
    bench.pipeline.cancel("nobody", first)
    assert bench.workers.discarded == [second.job]


def test_flights_of_another_run_land_like_its_own() -> None:
    bench = Bench()
    bench.pipeline.add("a", Flight(3, 5, Job.finished("saved", name="saved")))
    bench.launch("a", 4)
    assert bench.landing("a", 4) == []
    assert bench.landing("a", 5) == ["saved"]
    assert bench.landing("a", 6) == ["a4"]


def test_an_error_comes_out_when_it_lands_and_not_before() -> None:
    bench = Bench()

    def work() -> str:
        raise OSError("worker")

    bench.pipeline.launch("a", 1, work, lands=3, urgency=())
    bench.workers.run_all()
    assert bench.pipeline.due("a", 2) == []
    (flight,) = bench.pipeline.due("a", 3)
    with pytest.raises(OSError, match="worker"):
        flight.job.outcome()


def test_closing_keeps_what_is_in_flight() -> None:
    bench = Bench()
    bench.launch("a", 1)
    bench.pipeline.close()
    assert bench.workers.closed == 1
    assert bench.landing("a", 3) == ["a1"]
