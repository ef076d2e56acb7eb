"""The fault table: faults are done, counted and survived, and what is not is found."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from asteria.linalg.verified import verified_refresh
from asteria.refresh.job import Job
from asteria.runtime import host_refresh
from benchmarks import fault_injection as kinds
from benchmarks import fault_rows, faults
from benchmarks.fault_injection import Fault, FaultyPool, Injector, WorkerFault
from benchmarks.fault_rows import ALL, ROWS, UNDISTURBED, differences
from benchmarks.fault_run import Plan, train
from benchmarks.faults import evaluate, judge, launch, results_table

STEPS = 60
EXACT = [name for name, row in ROWS.items() if row.outcome == "same bits"]


def quick(row: str, **options: Any) -> Plan:
    return Plan(**{"row": row, "optimizer": "soap", "steps": STEPS, "quick": True, **options})


def quiet(count: int) -> None:
    """A listener of progress that does nothing."""


class ByHand:
    """An executor that does a job when it is told to."""

    size, deaths = 1, 0

    def __init__(self) -> None:
        self.jobs: list[Job[Any]] = []

    def submit(self, job: Job[Any]) -> None:
        self.jobs.append(job)

    def wait(self, job: Job[Any]) -> None:
        while not job.wait(0.001):
            if job in self.jobs:
                job.run()

    def discard(self, job: Job[Any]) -> None:
        self.jobs.remove(job)

    def close(self) -> None: ...


# One fault of one job.
def refresh_of(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, Job[Any]]:
    """A basis in use, and a job that refreshes it as workers do."""
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(1, 6, 6, generator=generator, dtype=dtype)
    basis = torch.linalg.qr(root).Q
    factor = root @ root.mT

    def work() -> Any:
        return host_refresh.verified_refresh(factor, basis, method="qr", sort=True)

    return basis, Job(work, name="a refresh", urgency=(0,))


def suffering(kind: str, size: float = 0.0) -> tuple[torch.Tensor, Job[Any], Injector]:
    basis, job = refresh_of()
    injector = Injector({}, seed=0)
    job.run = injector.faulty(job, Fault(kind, 0, size))  # type: ignore[method-assign]
    return basis, job, injector


@pytest.mark.parametrize("size", [0.1, 0.9])
@pytest.mark.parametrize(
    ("kind", "kept", "retried"),
    [
        (kinds.NONFINITE_FACTOR, {0: "nonfinite factor"}, 0),
        (kinds.LAPACK_FLOAT32, {}, 1),
        (kinds.LAPACK_ALWAYS, {0: "no basis"}, 0),
        (kinds.BAD_RESULT, {}, 1),
        (kinds.SLOW, {}, 0),
    ],
)
def test_a_fault_of_numerics_is_what_its_name_says(
    kind: str, size: float, kept: dict[int, str], retried: int
) -> None:
    basis, job, injector = suffering(kind, size)
    with injector.installed():
        job.run()
        again = refresh_of()[1]
        again.run()
    outcome = job.outcome()
    assert dict(outcome.failures.kept) == kept
    assert outcome.failures.retried == retried
    assert torch.equal(outcome.basis, basis) == bool(kept)
    assert injector.suffered == {job: {kind: 1}}
    assert again.outcome().failures.retried == 0
    assert host_refresh.verified_refresh is verified_refresh


def test_a_worker_raises() -> None:
    _, job, injector = suffering(kinds.RAISES)
    with injector.installed():
        job.run()
    with pytest.raises(WorkerFault):
        job.outcome()


@pytest.mark.parametrize(("kind", "deaths"), [(kinds.DIES, 1), (kinds.DIES_TWICE, 2)])
def test_a_worker_dies_as_often_as_asked_for(kind: str, deaths: int) -> None:
    _, job, injector = suffering(kind)
    with injector.installed():
        for _ in range(deaths):
            with pytest.raises(SystemExit):
                job.run()
        assert not job.done
        if kind == kinds.DIES:
            job.run()
            assert job.succeeded
    assert injector.total() == {kind: deaths}


def test_faults_depend_on_the_seed_only() -> None:
    rates = {kinds.SLOW: 0.3, kinds.DIES: 0.2}
    first, second, other = (Injector(rates, seed) for seed in (1, 1, 2))
    drawn = [first.draw() for _ in range(500)]
    assert drawn == [second.draw() for _ in range(500)]
    assert drawn != [other.draw() for _ in range(500)]
    shares = [sum(f is not None and f.kind == kind for f in drawn) / 500 for kind in rates]
    assert shares == pytest.approx([0.3, 0.2], abs=0.06)


def test_an_interrupt_ends_the_wait_and_then_the_job_is_done() -> None:
    executor, injector = ByHand(), Injector({kinds.INTERRUPT: 1.0}, seed=0)
    pool = FaultyPool(executor, injector)
    jobs = [refresh_of()[1] for _ in range(3)]
    for job in jobs:
        pool.submit(job)
    assert executor.jobs == []
    with pytest.raises(KeyboardInterrupt):
        pool.wait(jobs[0])
    pool.wait(jobs[0])
    assert jobs[0].succeeded
    assert injector.suffered == {jobs[0]: {kinds.INTERRUPT: 1}}
    executor.jobs.clear()
    pool.release()
    assert executor.jobs == jobs[1:]
    pool.discard(jobs[1])
    assert executor.jobs == jobs[2:]
    assert pool.discarded == {jobs[1]}


# Whole runs.
@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As in the process of a run: its bits are compared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, Any]:
    return train(quick(UNDISTURBED), quiet)


@pytest.mark.parametrize("row", list(ROWS))
def test_training_survives_and_every_fault_is_counted(
    row: str, undisturbed: dict[str, Any]
) -> None:
    done: list[int] = []
    record = train(quick(row), done.append)
    assert record["problems"] == []
    assert record["weights_finite"]
    assert sum(done) == STEPS
    assert (record["loss"] == undisturbed["loss"]) == (row in EXACT or not record["injected"])
    assert set(record["injected"]) <= {*ROWS[row].jobs, *ROWS[row].loop}
    json.dumps(record, allow_nan=False)


@pytest.mark.parametrize("optimizer", ["klshampoo", "klsoap"])
def test_every_optimizer_survives_all_of_them(optimizer: str) -> None:
    assert train(quick(ALL, optimizer=optimizer), quiet)["problems"] == []


def test_a_run_in_a_process_of_its_own_is_the_same(undisturbed: dict[str, Any]) -> None:
    done: list[int] = []
    record = launch(quick(UNDISTURBED), done.append)
    assert sum(done) == STEPS
    ending = record.pop("exit")
    assert (ending["code"], ending["stderr"]) == (0, "")
    assert record["loss"] == undisturbed["loss"]
    assert faults.ending_problems({**record, "exit": ending}) == []


def test_a_process_that_breaks_off_is_reported() -> None:
    record = launch(quick("no such row"), quiet)
    problems = judge(ROWS[UNDISTURBED], record, record, 0.0)
    assert problems[0] == "training did not end"
    assert problems[1] == "the process ended with status 1"
    assert "no such row" in problems[2]


# What is concluded from records.
def record_of(**changes: Any) -> dict[str, Any]:
    return {
        "injected": {},
        "dropped": {},
        "counted": {},
        "caught": {},
        "calls": 3,
        "steps": 3,
        "problems": [],
        "weights_finite": True,
        "final": 2.0,
        "loss": [5.0, 3.0, 2.0],
        "validation": [[1, 5.0], [2, 3.0], [3, 2.0]],
        "exit": {"code": 0, "stderr": "", "seconds": 0.1},
        **changes,
    }


SLOW = {"injected": {kinds.SLOW: 1}}
RAISED = {"injected": {kinds.RAISES: 1}}


@pytest.mark.parametrize(
    ("row", "changes", "found"),
    [
        (kinds.SLOW, SLOW, []),
        (kinds.SLOW, {}, ["never happened: slow worker"]),
        (kinds.SLOW, {**SLOW, "loss": [5.0, 3.0, 2.1]}, ["not the bits of the undisturbed run"]),
        (kinds.RAISES, {**RAISED, "final": 2.29}, []),
        (
            kinds.RAISES,
            {**RAISED, "final": 2.31},
            ["the final loss is off by more than 3 standard deviations"],
        ),
        (kinds.SLOW, {**SLOW, "weights_finite": False}, ["a weight or a loss is not finite"]),
        (kinds.SLOW, {**SLOW, "problems": ["lost one"]}, ["lost one"]),
        (
            kinds.SLOW,
            {**SLOW, "exit": {"code": -6, "stderr": "x\nabort\n", "seconds": 19.0}},
            [
                "the process took 19.0 s to end",
                "the process ended with status -6",
                "the process complained: abort",
            ],
        ),
    ],
)
def test_a_row_is_judged(row: str, changes: dict[str, Any], found: list[str]) -> None:
    assert judge(ROWS[row], record_of(**changes), record_of(), 0.1) == found


def test_what_was_dropped_is_not_expected_in_the_counters() -> None:
    record = record_of(
        injected={kinds.NONFINITE_FACTOR: 4, kinds.DIES_TWICE: 5, kinds.DIES: 1},
        dropped={kinds.NONFINITE_FACTOR: 1, kinds.DIES_TWICE: 1},
        counted={
            "failures['nonfinite factor']": 3,
            "failures['worker raised']": 2,
            "worker_deaths": 6,
        },
        caught={"RefreshError": 2},
    )
    assert differences(record) == []
    record["counted"]["failures['nonfinite factor']"] = 4
    record["counted"]["skipped_steps"] = 1
    assert differences(record) == [
        "failures['nonfinite factor']: 4, not 3",
        "skipped_steps: 1, not 0",
    ]


def test_every_kind_has_a_row_of_its_own_and_a_place_in_the_last_one() -> None:
    single = [row for name, row in ROWS.items() if name not in (UNDISTURBED, ALL)]
    assert all([*row.jobs, *row.loop] == [name] for name, row in ROWS.items() if row in single)
    assert {*ROWS[ALL].jobs, *ROWS[ALL].loop} == {row.name for row in single}
    assert sum(ROWS[ALL].jobs.values()) < 0.5


def test_losses_are_set_against_the_seeds() -> None:
    seeds = {seed: record_of(final=2.0 + 0.1 * seed) for seed in range(3)}
    rows = {kinds.RAISES: record_of(**{**RAISED, "final": 2.2}), kinds.SLOW: record_of()}
    found = evaluate(seeds, rows)
    assert found["noise"] == pytest.approx(0.1 * math.sqrt(2))
    assert list(found["failed"]) == [kinds.SLOW]
    table = results_table(seeds, rows, found).splitlines()
    raised = next(line for line in table if line.startswith(kinds.RAISES))
    assert raised.split()[2:9] == ["1", "0", "2.2000", "0.2000", "1.41", "within", "noise"]
    assert "FAILED" in table[-1]


def test_a_skipped_step_must_be_as_if_step_was_not_called() -> None:
    raised = record_of(injected={fault_rows.LOOP_RAISES: 1})
    skipped = record_of(injected={fault_rows.GRADIENT: 1})
    rows = {fault_rows.LOOP_RAISES: raised, fault_rows.GRADIENT: skipped}
    seeds = {0: record_of(), 1: record_of(final=2.1)}
    assert evaluate(seeds, rows)["failed"] == {}
    skipped["loss"] = [5.0, 3.0, 2.2]
    assert list(evaluate(seeds, rows)["failed"]) == [fault_rows.GRADIENT]


def run_main(
    monkeypatch: pytest.MonkeyPatch, path: Path, changes: Callable[[Plan], dict[str, Any]]
) -> dict[str, Any]:
    def made_up(plan: Plan, on_steps: Callable[[int], None]) -> dict[str, Any]:
        on_steps(plan.steps)
        injected = dict.fromkeys((*ROWS[plan.row].jobs, *ROWS[plan.row].loop), 1)
        return record_of(injected=injected, **changes(plan))

    monkeypatch.setattr(faults, "launch", made_up)
    faults.main(["--quick", "--seeds", "2", "--json", str(path)])
    report: dict[str, Any] = json.loads(path.read_text())
    return report


def test_the_command_writes_a_report_and_a_plot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "results" / "faults.json"
    report = run_main(monkeypatch, path, lambda plan: {"final": 2.0 + plan.seed})
    assert report["failed"] == {}
    assert report["noise"] == pytest.approx(1.0)
    assert list(report["rows"]) == [name for name in ROWS if name != UNDISTURBED]
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert fault_rows.RELOAD in capsys.readouterr().out


def test_the_command_fails_with_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "faults.json"

    def changes(plan: Plan) -> dict[str, Any]:
        return {"weights_finite": plan.row != ALL}

    with pytest.raises(SystemExit, match="1"):
        run_main(monkeypatch, path, changes)
    assert f"{ALL}: a weight or a loss is not finite" in capsys.readouterr().out
    assert list(json.loads(path.read_text())["failed"]) == [ALL]
    assert path.with_suffix(".png").exists()
