"""A rank that is killed or stopped ends the others in time; the run resumes to the same bits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.rank_fault_run import EXACT, KILL, LOCAL, MODES, PHASES, REPLICATED, STOP, Plan
from benchmarks.rank_faults import Outcome, attempt, draw, judge, table, undisturbed

STEPS, TIMEOUT_S = 12, 4.0
PLANS = [
    Plan(2, STEPS, TIMEOUT_S, REPLICATED, 1, "in a refresh", step=6, how=KILL),
    Plan(2, STEPS, TIMEOUT_S, REPLICATED, 0, "in a refresh", step=6, how=STOP, install="ready"),
    Plan(2, STEPS, TIMEOUT_S, EXACT, 1, "in step()", step=6, how=KILL),
    Plan(2, STEPS, TIMEOUT_S, EXACT, 1, "while saving", step=7, how=STOP),
    Plan(2, STEPS, TIMEOUT_S, LOCAL, 0, "in backward", step=6, how=KILL),
]


@pytest.fixture(scope="module")
def wanted() -> dict[str, dict[int, bytes]]:
    """Weights of runs that nothing happens to."""
    return {mode: undisturbed(mode, 2, STEPS, TIMEOUT_S) for mode in MODES}


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: f"{plan.mode} {plan.how} {plan.phase}")
def test_the_others_raise_end_and_resume(plan: Plan, wanted: dict[str, dict[int, bytes]]) -> None:
    record = attempt(plan, wanted[plan.mode] if plan.install == "scheduled" else None)
    assert not record["problems"], record
    assert str(plan.victim) not in record["errors"]


def good(plan: Plan) -> tuple[Outcome, Outcome]:
    """A run as it should be, and one that went on from its checkpoint."""
    others = [rank for rank in range(plan.ranks) if rank != plan.victim]
    told = f"CoherenceError: rank {plan.victim} is gone"
    hurt = Outcome(10.0, dict.fromkeys(others, 11.0), dict.fromkeys(others, told))
    ranks = range(plan.ranks)
    resumed = Outcome(
        None, dict.fromkeys(ranks, 20.0), dict.fromkeys(ranks, ""), dict.fromkeys(ranks, b"w")
    )
    return hurt, resumed


Spoil = Callable[[Outcome, Outcome], Any]


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda hurt, _: setattr(hurt, "hurt_s", None), "nothing has happened"),
        (lambda hurt, _: hurt.errors.pop(0), "rank 0 never ended"),
        (lambda hurt, _: hurt.errors.update({2: ""}), "rank 2 did not notice"),
        (lambda hurt, _: hurt.ended_s.update({2: 99.0}), "rank 2 took 89.0 s"),
        (lambda hurt, _: hurt.orphans.append(2), "rank 2 is an orphan"),
        (
            lambda hurt, _: hurt.errors.update(dict.fromkeys((0, 2), "CoherenceError: rank 0 is")),
            "nobody has named rank 1",
        ),
        (lambda _, resumed: resumed.errors.update({1: "broken"}), "resumed, rank 1: broken"),
        (lambda _, resumed: resumed.weights.update({1: b"v"}), "resumed, rank 1 has other"),
    ],
)
def test_what_is_wrong_is_found(spoil: Spoil, problem: str) -> None:
    plan = Plan(3, STEPS, TIMEOUT_S, victim=1)
    hurt, resumed = good(plan)
    spoil(hurt, resumed)
    (found,) = judge(plan, hurt, resumed)
    assert found.startswith(problem)


def test_nothing_is_wrong_with_a_good_run() -> None:
    plan = Plan(3, STEPS, TIMEOUT_S, victim=1)
    same = dict.fromkeys(range(3), b"w")
    assert judge(plan, *good(plan), same) == judge(plan, *good(plan)) == []
    assert judge(plan, *good(plan), dict.fromkeys(range(3), b"v")) == [
        f"resumed, rank {rank} has other weights" for rank in range(3)
    ]


def test_all_kinds_of_faults_are_drawn() -> None:
    plans = [draw(seed) for seed in range(250)]
    assert {(plan.mode, plan.phase) for plan in plans} == {(m, p) for m in MODES for p in PHASES}
    assert {plan.how for plan in plans} == {KILL, STOP}
    assert {plan.victim for plan in plans} == {0, 1, 2}
    assert {plan.install for plan in plans} == {"scheduled", "ready"}
    assert draw(3) == draw(3)
    for plan in plans:
        assert 0 < plan.step < plan.steps - 1
        assert plan.phase != "while saving" or plan.step % 4 == 3


def test_the_table_counts_by_kind(tmp_path: Path) -> None:
    record = {
        "mode": EXACT,
        "how": KILL,
        "phase": "in step()",
        "latest_s": 0.5,
        "errors": {"0": "CoherenceError: x"},
    }
    lines = table([{**record, "problems": []}, {**record, "problems": ["late"]}]).splitlines()
    assert lines[-1].split() == "exact in step() kill -9 2 0.50 CoherenceError 2 1".split()
