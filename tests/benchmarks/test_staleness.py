"""The staleness study: which runs it makes, and what it concludes from made-up ones."""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import convergence, processes, staleness
from benchmarks.runs import NEVER, Lab, Run
from benchmarks.staleness import BASELINE, DEFAULT, NOISE, Arm, Study
from examples import train_gpt
from tests.benchmarks.tiny import CORPUS, TASK, Bar

STUDY = Study(optimizer="soap", lr=4e-3, steps=300, seeds=(0, 1, 2))
SOAP = Run(optimizer="soap", lr=3e-3, steps=6, warmup=2)


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Studies set the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def made_up(**gaps: float) -> dict[str, dict[str, Any]]:
    """Results of runs whose losses lie ``gaps`` above the synchronous ones."""
    arms = staleness.make_arms()
    arm_of = {run: name for name, arm in arms.items() for run in STUDY.runs({name: arm})}

    def runner(run: Run) -> dict[str, Any]:
        gap = gaps.get(arm_of[run], 0.1)
        spread = {0: -1, 1: 0, 2: 1}[run.seed] * gap / 2
        loss = 2.0 + run.seed / 10 + gap + spread
        broken = math.isinf(gap)
        return {
            "final": None if broken else loss,
            "loss": [loss],
            "optimizer_s": [0.001, 0.003],
            "stats": {} if arm_of[run] == BASELINE else {"waits": 4, "wait_s": 0.5},
        }

    return staleness.compare(arms, runner, STUDY)


# Which runs are made.


def test_thirteen_arms_differ_from_each_other() -> None:
    arms = staleness.make_arms()
    assert len(arms) == 13
    assert len({STUDY.run(arm, 0) for arm in arms.values()}) == 13
    assert [arm.delay for arm in arms.values() if arm.delay is not None] == [2, 0, 1, 5, 10, 50]


def test_the_default_arm_says_asynchronous_and_nothing_else() -> None:
    arms = staleness.make_arms()
    assert arms[DEFAULT].runtime == (("refresh", "async"),)
    assert dict(arms["naive"].runtime) == {"refresh": "async", "start": "eigh", "staleness": 10}
    assert dict(arms["delay 50"].runtime) == {"refresh": "async", "staleness": 50}
    assert staleness.asynchronous(staleness=2, start="fresh") == arms[DEFAULT].runtime
    for name in (BASELINE, NOISE, "frozen"):
        assert dict(arms[name].runtime) == {"refresh": "sync"}


def test_runs_are_at_a_constant_rate_and_arms_change_only_what_they_name() -> None:
    arms = staleness.make_arms()
    base = STUDY.run(arms[BASELINE], 1)
    assert (base.schedule, base.warmup, base.seed) == ("constant", 60, 1)
    assert base.options == (("precondition_frequency", 10),)
    assert STUDY.run(arms["frozen"], 1) == replace(base, frozen_after=150)
    assert STUDY.run(arms[NOISE], 1) == replace(base, perturbation=1e-6)
    half = replace(base, runtime=arms[DEFAULT].runtime, options=(("precondition_frequency", 5),))
    assert STUDY.run(arms["period 5"], 1) == half
    assert [run.seed for run in STUDY.runs(arms)] == [0] * 13 + [1] * 13 + [2] * 13


def test_only_a_frozen_run_changes_on_the_way() -> None:
    frozen = STUDY.run(staleness.make_arms()["frozen"], 0)
    optimizer = frozen.make_optimizer(torch.nn.Linear(2, 2))
    for step, period in ((0, 10), (149, 10), (150, NEVER), (151, NEVER)):
        frozen.before(step, optimizer)
        assert optimizer.param_groups[0]["precondition_frequency"] == period


# What is concluded.


def test_gaps_are_paired_by_seed() -> None:
    arm = made_up(synchronous=0.0, asynchronous=0.02)[DEFAULT]
    assert arm["gaps"] == pytest.approx([0.01, 0.02, 0.03])
    assert arm["gap"] == pytest.approx(0.02)
    assert arm["standard_error"] == pytest.approx(0.01 / math.sqrt(3))
    assert arm["optimizer_ms"] == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("differences", "mean", "error"),
    [([0.5], 0.5, math.nan), ([0.1, math.inf], math.inf, math.nan), ([1.0, 3.0], 2.0, 1.0)],
)
def test_an_error_that_does_not_exist_is_nan(
    differences: list[float], mean: float, error: float
) -> None:
    assert staleness.mean_and_error(differences) == pytest.approx((mean, error), nan_ok=True)


@pytest.mark.parametrize(("gap", "met"), [(0.009, True), (0.011, False), (math.inf, False)])
def test_the_defaults_have_to_stay_within_the_target(
    gap: float, met: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    results = made_up(synchronous=0.0, asynchronous=gap, perturbed=0.002, **{"delay 0": 0.0})
    verdict = staleness.judge(results)
    assert verdict["met"] is met
    assert verdict["noise"] == pytest.approx(0.002 * math.sqrt((0.25 + 1 + 2.25) / 3))
    assert verdict["delay_0_is_synchronous"] is True
    staleness.print_results(results, verdict, STUDY)
    printed = capsys.readouterr().out
    assert f"at most 0.01: {'met' if met else 'MISSED'}" in printed
    assert "bit for bit: yes" in printed
    row = next(line for line in printed.splitlines() if line.startswith("asynchronous, delay 5 "))
    assert row.split()[3:] == "+0.1000 0.0289 2.0500 2.2000 2.3500 2.0 4".split()


def test_other_bits_at_delay_0_are_reported() -> None:
    results = made_up(synchronous=0.0, **{"delay 0": 1e-9})
    assert staleness.judge(results)["delay_0_is_synchronous"] is False


@pytest.mark.parametrize("broken", [(), ("naive", "delay 50"), tuple(staleness.make_arms())])
def test_made_up_results_can_be_drawn(broken: tuple[str, ...], tmp_path: Path) -> None:
    results = made_up(**{BASELINE: 0.0} | dict.fromkeys(broken, math.inf))
    staleness.plot(results, staleness.judge(results), "soap", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


# The command.


def test_several_jobs_have_one_thread_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert staleness.parse_arguments(["--jobs", "2"]).threads == 1
    assert staleness.parse_arguments([]).threads is None
    assert staleness.parse_arguments(["--optimizer", "klsoap"]).lr == 4e-3
    for words in (["--jobs", "2", "--threads", "2"], ["--jobs", "0"]):
        with pytest.raises(SystemExit):
            staleness.parse_arguments(words)
    assert "found --threads 2" in capsys.readouterr().err


@pytest.mark.slow
def test_parallel_runs_give_the_same_bits_and_are_stored(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    task, runs = replace(TASK, threads=1), [SOAP, replace(SOAP, seed=1)]
    bar = Bar(total=12)
    parallel = Lab(task, CORPUS, tmp_path / "parallel", bar)
    processes.execute_missing(parallel, runs, jobs=2)
    assert (bar.n, bar.total) == (12, 12)
    alone = Lab(task, CORPUS, tmp_path / "alone", Bar(total=12))
    for run in runs:
        assert parallel(run)["loss"] == alone(run)["loss"]
        assert parallel(run)["final"] == alone(run)["final"]
        assert parallel(run)["threads"] == 1
        assert parallel.path(run).exists()


def test_parallel_runs_need_a_task_of_one_thread(tmp_path: Path) -> None:
    lab = Lab(TASK, CORPUS, tmp_path, Bar(total=6))
    with pytest.raises(ValueError, match="one thread"):
        processes.execute_missing(lab, [SOAP], jobs=2)
    assert lab.path(SOAP) != Lab(replace(TASK, threads=1), CORPUS, tmp_path, Bar(0)).path(SOAP)


def test_the_command_writes_results_and_a_plot_and_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usual = staleness.make_arms()
    few = {name: replace(usual[name], runtime=usual[BASELINE].runtime) for name in (DEFAULT, NOISE)}
    arms = {BASELINE: usual[BASELINE], **few, "frozen": usual["frozen"]}
    arms["delay 0"] = Arm(label="another period", period=3, delay=0)
    monkeypatch.setattr(staleness, "make_arms", lambda: arms)
    monkeypatch.setattr(train_gpt, "load_corpus", lambda: CORPUS)
    path = tmp_path / "results" / "quick.json"
    words = ["--staleness", "--quick", "--seeds", "0", "1", "--threads", "1"]
    convergence.main([*words, "--out", str(tmp_path), "--json", str(path)])
    assert "at most 0.01: met" in capsys.readouterr().out
    results = json.loads(path.read_text())
    assert results["arms"][DEFAULT]["gaps"] == [0.0, 0.0]
    assert results["arms"][BASELINE]["same_bits"] is True
    assert results["arms"]["frozen"]["gap"] != 0
    assert results["settings"]["task"]["threads"] == 1
    assert len(results["runs"]) == 8
    assert {run["threads"] for run in results["runs"]} == {1}
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr("benchmarks.runs.execute", None)
    convergence.main([*words, "--out", str(tmp_path)])


def test_the_rate_can_be_raised_again() -> None:
    study = staleness.Study(optimizer="soap", lr=1.0, steps=100, seeds=(0,), schedule="raised")
    run = study.run(staleness.make_arms()["asynchronous"], 0)
    assert [run.factor(step) for step in (0, 9, 19, 49, 50, 99)] == [0.05, 0.5, 1, 1, 3, 3]


def test_arms_can_be_chosen_beside_those_that_are_judged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "report.json"
    out = ["--out", str(tmp_path / "runs"), "--json", str(report)]
    staleness.main(["--quick", "--seeds", "0", "1", "--raised", "--arms", "frozen", *out])
    arms = json.loads(report.read_text())["arms"]
    assert set(arms) == {"synchronous", "perturbed", "asynchronous", "delay 0", "frozen"}
    with pytest.raises(SystemExit):
        staleness.main(["--arms", "melted"])
    assert "unknown arms ['melted']" in capsys.readouterr().err
