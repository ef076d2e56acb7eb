"""Which steps refresh, as tables."""

import pytest

from asteria.refresh.schedule import is_due, is_young_step, young_steps

YOUNG = [2, 3, 5, 8, 12, 18, 27, 41, 62, 93, 140, 210, 315]


def test_young_steps_are_geometrically_spaced() -> None:
    assert [step for step in range(0, 400) if is_young_step(step)] == YOUNG


@pytest.mark.parametrize(("beta", "steps"), [(0.0, 8), (0.5, 16), (0.75, 32), (0.9375, 128)])
def test_a_factor_is_young_for_eight_time_constants(beta: float, steps: int) -> None:
    assert young_steps(beta) == steps


@pytest.mark.parametrize(("beta", "steps"), [(0.9, 80), (0.95, 160), (0.98, 400), (0.999, 8000)])
def test_rounding_adds_a_step_at_most(beta: float, steps: int) -> None:
    assert young_steps(beta) in (steps, steps + 1)


@pytest.mark.parametrize(
    ("period", "young_until", "due"),
    [
        (1, 0, list(range(1, 25))),
        (10, 0, [10, 20]),
        (7, 0, [7, 14, 21]),
        (100, 0, []),
        (10, 160, [2, 3, 5, 8, 10, 12, 18, 20]),
        (10, 12, [2, 3, 5, 8, 10, 20]),
        (10, 13, [2, 3, 5, 8, 10, 12, 20]),
        (100, 160, [2, 3, 5, 8, 12, 18]),
        (6, 3, [2, 6, 12, 18, 24]),
        (1000, 2, []),
    ],
)
def test_due_steps(period: int, young_until: int, due: list[int]) -> None:
    steps = range(1, 25)
    assert [s for s in steps if is_due(s, period=period, young_until=young_until)] == due


def test_a_grown_up_factor_is_refreshed_by_the_period_only() -> None:
    steps = range(160, 400)
    due = [step for step in steps if is_due(step, period=10, young_until=young_steps(0.95))]
    assert due == list(range(160, 400, 10))
