"""Which steps refresh, as tables."""

import pytest

from asteria.refresh.schedule import is_due, is_young_step, phases, young_steps

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
    ("period", "phase", "due"),
    [
        (1, 0.0, list(range(1, 25))),
        (1, 0.9, list(range(1, 25))),
        (10, 0.0, [10, 20]),
        (10, 0.09, [10, 20]),
        (10, 0.1, [9, 19]),
        (10, 0.55, [5, 15]),
        (10, 0.99, [1, 11, 21]),
        (7, 0.0, [7, 14, 21]),
        (7, 0.5, [4, 11, 18]),
        (100, 0.0, []),
        (100, 0.8, [20]),
    ],
)
def test_due_steps(period: int, phase: float, due: list[int]) -> None:
    assert [s for s in range(1, 25) if is_due(s, period=period, phase=phase)] == due


@pytest.mark.parametrize("phase", [0.0, 0.3, 0.7])
def test_a_basis_that_is_a_period_old_is_due_whatever_the_phase(phase: float) -> None:
    for version in range(12):
        due = [s for s in range(13, 30) if is_due(s, period=10, phase=phase, version=version)]
        assert due == [
            s for s in range(13, 30) if s >= version + 10 or is_due(s, period=10, phase=phase)
        ]


def test_a_young_basis_is_refreshed_at_its_phase_all_the_same() -> None:
    assert is_due(20, period=10, version=19)
    assert not is_due(19, period=10, version=18)


@pytest.mark.parametrize("period", range(1, 30))
def test_every_phase_has_one_step_of_each_period(period: int) -> None:
    for phase in (0.0, 1e-9, 0.25, 1 / 3, 0.5, 0.999999):
        due = [s for s in range(1, 4 * period + 1) if is_due(s, period=period, phase=phase)]
        assert len(due) == 4
        assert {b - a for a, b in zip(due, due[1:], strict=False)} <= {period}


@pytest.mark.parametrize(
    ("costs", "wanted"),
    [
        ([], []),
        ([5.0], [0.0]),
        ([1.0, 1.0, 1.0, 1.0], [0.0, 0.25, 0.5, 0.75]),
        ([6.0, 1.0, 1.0], [0.0, 0.75, 0.875]),
        ([1.0, 1.0, 6.0], [0.0, 0.125, 0.25]),
        ([0.0, 2.0, 2.0], [0.0, 0.0, 0.5]),
        ([0.0, 0.0], [0.0, 0.0]),
    ],
)
def test_phases_share_the_period_by_cost(costs: list[float], wanted: list[float]) -> None:
    assert phases(costs) == wanted


@pytest.mark.parametrize("period", [3, 10, 25])
def test_no_step_has_much_more_to_do_than_another(period: int) -> None:
    """At most an equal share and one unit more, whatever the costs and their order."""
    costs = [float(1 + (37 * index) % 11) for index in range(60)]
    for given in (costs, sorted(costs), sorted(costs, reverse=True)):
        spread = list(zip(given, phases(given), strict=True))
        loads = [
            sum(cost for cost, phase in spread if is_due(step, period=period, phase=phase))
            for step in range(1, period + 1)
        ]
        assert sum(loads) == sum(costs)
        assert max(loads) <= sum(costs) / period + max(costs)
