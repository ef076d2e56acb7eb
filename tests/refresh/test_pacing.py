"""What refreshes cost, and what is affordable."""

import pytest

from asteria.refresh.pacing import Pace, affordable_period, young_stride


@pytest.mark.parametrize(
    ("round_s", "step_s", "jobs", "share", "period"),
    [
        (1.0, 0.1, 1, 0.5, 20),
        (1.0, 0.1, 2, 0.5, 10),
        (1.0, 0.1, 1, 1.0, 10),
        (1.01, 0.1, 1, 1.0, 11),
        (0.001, 0.1, 1, 0.5, 1),
        (0.0, 0.1, 1, 0.5, 1),
    ],
)
def test_period(round_s: float, step_s: float, jobs: int, share: float, period: int) -> None:
    assert affordable_period(round_s, step_s, jobs=jobs, share=share) == period


def test_cheap_rounds_are_never_left_out() -> None:
    assert young_stride(9.9, 1e-6, rounds=11, steps=160) == 1


def test_dear_rounds_are_thinned_to_half_of_the_first_steps_time() -> None:
    assert young_stride(20.0, 1.0, rounds=10, steps=160) == 3  # 200 s asked, 80 s allowed
    assert young_stride(20.0, 10.0, rounds=10, steps=160) == 1  # 800 s allowed


def test_steps_are_timed_without_their_own_refreshes() -> None:
    pace = Pace()
    for now, refresh in ((0.0, 0.0), (1.0, 4.0), (6.0, 0.0), (7.0, 0.0)):
        pace.begin_step(now)
        if refresh:
            pace.refreshed_inside(refresh)
    assert pace.steps == 3
    assert pace.step_s == 1.0
    assert list(pace.rounds_s) == [4.0]


def test_a_round_counts_every_unit_once() -> None:
    pace = Pace()
    assert pace.round_s(4) == 0.0
    pace.worked("a", 1.0)
    pace.worked("b", 2.0)
    pace.worked("a", 4.0)
    assert pace.seen_units == 2
    assert pace.round_s(2) == 6.0
    assert pace.round_s(4) == 12.0


def test_waits_are_no_part_of_a_step() -> None:
    """A slow host would make steps long, and a short period look affordable."""
    pace = Pace()
    for step in range(4):
        pace.begin_step(5.0 * step)
        pace.waited(4.0, overdue_s=3.0)
    assert pace.step_s == 1.0


def test_first_bases_are_no_round() -> None:
    pace = Pace()
    pace.begin_step(0.0)
    pace.made_bases(7.0)
    pace.begin_step(8.0)
    assert pace.step_s == 1.0
    assert not pace.rounds_s
    assert pace.count_of_rounds == 0


def test_waiting_is_judged_once_enough_steps_are_known() -> None:
    pace = Pace()
    for step in range(40):
        pace.begin_step(float(step))
        if step < 32:
            assert pace.waiting_share == 0.0
        pace.waited(0.5, overdue_s=0.25)
    assert pace.waiting_share == pytest.approx(0.25 / 0.75)
