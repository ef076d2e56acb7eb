"""A job: what it keeps, what it tells, and what becomes of errors."""

import gc
import traceback
import weakref

import pytest

from asteria.refresh.job import Job


class Fault(Exception):
    """Of a job's work."""


def job_of(work: object, **options: object) -> Job[object]:
    return Job(work, name="a job", urgency=(), **options)  # type: ignore[arg-type]


def failing() -> None:
    raise Fault("for this reason")


def test_it_hands_over_what_the_work_returned() -> None:
    job = Job(lambda: [1, 2], name="two numbers", urgency=(3, -0.5))
    assert (job.name, job.urgency) == ("two numbers", (3, -0.5))
    assert (job.done, job.succeeded, job.attempts) == (False, False, 0)
    job.run()
    assert (job.done, job.succeeded, job.attempts) == (True, True, 1)
    assert job.outcome() == [1, 2]
    assert job.outcome() is job.outcome()


def test_it_is_asked_when_it_is_done() -> None:
    with pytest.raises(RuntimeError, match="'a job' was asked for its outcome before its end"):
        job_of(lambda: 1).outcome()


def test_an_error_is_the_outcome_with_the_traceback_of_its_work() -> None:
    job = job_of(failing)
    job.run()
    assert job.done
    assert not job.succeeded
    for _ in range(2):
        with pytest.raises(Fault, match="for this reason") as caught:
            job.outcome()
        names = [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
        assert "failing" in names


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, GeneratorExit])
def test_what_ends_a_thread_passes_through_and_the_work_can_be_repeated(
    kind: type[BaseException],
) -> None:
    outcomes = iter([kind("first"), "second"])

    def work() -> object:
        outcome = next(outcomes)
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    job = job_of(work)
    with pytest.raises(kind):
        job.run()
    assert (job.done, job.attempts) == (False, 1)
    job.run()
    assert (job.outcome(), job.attempts) == ("second", 2)


def test_the_work_is_done_once() -> None:
    times = []
    job = job_of(lambda: times.append(0))
    job.run()
    job.run()
    assert times == [0]
    assert job.attempts == 1


@pytest.mark.parametrize("fails", [False, True])
def test_what_the_work_held_is_freed_when_it_is_done(fails: bool) -> None:
    class Held:
        pass

    held = Held()
    reference = weakref.ref(held)

    def work(kept: Held = held) -> None:
        if fails:
            raise Fault

    job = job_of(work)
    del held, work
    assert reference() is not None
    job.run()
    if fails:
        with pytest.raises(Fault):
            job.outcome()  # whose traceback may hold it as long as the error lives
        job.fail(Fault())
    gc.collect()
    assert reference() is None


def test_one_that_is_given_up_raises_what_it_is_given_up_for() -> None:
    job = job_of(lambda: 1)
    job.fail(Fault("lost"))
    assert job.done
    with pytest.raises(Fault, match="lost"):
        job.outcome()
    job.run()
    assert job.attempts == 0, "nobody wants it any more"


def test_one_that_was_done_elsewhere() -> None:
    job = Job.finished({"a": 1}, name="saved")
    assert job.succeeded
    assert job.outcome() == {"a": 1}


def test_it_measures_its_time() -> None:
    job = job_of(lambda: sum(range(20_000)))
    job.run()
    assert 0 < job.started_ns < job.ended_ns
    assert 0 < job.cpu_s <= 1.5e-9 * (job.ended_ns - job.started_ns) + 0.01


def test_waiting_tells_whether_the_end_came() -> None:
    job = job_of(lambda: 1)
    assert not job.wait(0.0)
    job.run()
    assert job.wait(0.0)


def test_the_child_of_a_fork_makes_a_lock_of_its_own_unless_the_job_is_done() -> None:
    job, done = job_of(lambda: 1), job_of(lambda: 2)
    done.run()
    for each in (job, done):
        each.renew_lock()
    assert done.outcome() == 2
    assert not job.done
    job.run()
    assert job.wait(0.0)
