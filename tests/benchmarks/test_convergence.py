"""The convergence benchmark: what it concludes from made-up runs, and what it stores."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import convergence
from benchmarks.convergence import ARMS, Study
from benchmarks.runs import Run
from examples import train_gpt

CORPUS = train_gpt.load_corpus(Path(__file__))


class MadeUp:
    """Losses from a formula: each arm has a best rate, and more steps help."""

    def __init__(self) -> None:
        self.asked: list[Run] = []

    def __call__(self, run: Run) -> dict[str, Any]:
        self.asked.append(run)
        best, level = {"adamw": (4e-3, 2.4), "soap": (4.8e-2, 2.0)}.get(
            run.optimizer, (1.2e-2, 2.2)
        )
        final = level + abs(math.log(run.lr / best)) + 0.1 * run.seed + (300 - run.steps) / 200
        points = [[step, step / 10, 6 - step * (6 - final) / run.steps] for step in (100, 200)]
        points.append([run.steps, run.steps / 10, final])
        broken = run.lr == 6e-3
        return {
            "final": None if broken else final,
            "validation": [] if broken else points,
            "optimizer_s": [0.001, 0.003],
            "state_bytes": 1_000_000,
        }


def study_of(runner: MadeUp) -> tuple[Study, dict[str, Any], dict[str, Any]]:
    study = Study(steps=300, seeds=(0, 1))
    arms = {key: convergence.tune(arm, runner, study) for key, arm in ARMS.items()}
    return study, arms, convergence.shorten(arms, runner, study)


def test_every_arm_is_tuned_over_as_many_rates() -> None:
    assert {len(arm.rates) for arm in ARMS.values()} == {4}
    assert all(list(arm.rates) == sorted(arm.rates) for arm in ARMS.values())


def test_the_best_rate_of_the_first_seed_runs_with_the_others() -> None:
    runner = MadeUp()
    tuned = convergence.tune(ARMS["adamw"], runner, Study(steps=300, seeds=(3, 5, 6)))
    assert tuned["lr"] == 4e-3
    assert not tuned["lr_at_edge"]
    assert tuned["final"] == pytest.approx([2.7, 2.9, 3.0])
    assert tuned["mean"] == pytest.approx(8.6 / 3)
    assert tuned["optimizer_ms"] == pytest.approx(2.0)
    assert {run.lr for run in runner.asked if run.seed == 3} == set(ARMS["adamw"].rates)
    assert {run.lr for run in runner.asked if run.seed != 3} == {4e-3}


def test_a_best_rate_at_the_edge_and_a_broken_run_are_reported(
    capsys: pytest.CaptureFixture[str],
) -> None:
    study, arms, lengths = study_of(MadeUp())
    assert arms["soap"]["lr_at_edge"]
    assert arms["soap"]["tried"][0] == [6e-3, math.inf]
    convergence.print_results(arms, lengths, study.seeds)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("SOAP  ")]
    fields = "SOAP 0.048* 2.000 2.100 2.050 -0.400 -0.400 2.0 1.0".split()
    assert [row.split() for row in rows] == [fields]


def test_the_shortest_schedule_that_reaches_adamw_is_found() -> None:
    _, _, lengths = study_of(MadeUp())
    assert lengths["adamw_steps"] == 400
    assert lengths["lengths"] == [200, 220, 240, 260]
    for row in lengths["seeds"]:  # AdamW 400: 1.9; SOAP n: 2 + (300 - n) / 200: never
        assert row["target"] == pytest.approx(1.9 + 0.1 * row["seed"])
        assert row["steps"] is None
    losses = [2.5, 2.26, 2.27, 2.1]
    assert convergence.shortest([200, 220, 240, 260], losses, 2.268) == 220


def test_the_progress_bar_expects_all_runs() -> None:
    runner = MadeUp()
    study, _, _ = study_of(runner)
    assert sum(run.steps for run in set(runner.asked)) == study.total_steps


def test_all_schedules_warm_up_alike() -> None:
    runner = MadeUp()
    study_of(runner)
    assert {run.warmup for run in runner.asked} == {60}
    run = Run(optimizer="soap", lr=1.0, steps=100, warmup=10)
    constant = replace(run, schedule="constant")
    assert [run.factor(step) for step in (0, 9)] == [0.1, 1.0]
    assert [constant.factor(step) for step in (0, 9, 99)] == [0.1, 1.0, 1.0]
    assert run.factor(99) < 0.01


def test_the_command_writes_results_and_a_plot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = {key: replace(ARMS[key], rates=(3e-3, 6e-3)) for key in ("adamw", "soap_reference")}
    monkeypatch.setattr(convergence, "ARMS", few)
    monkeypatch.setattr(train_gpt, "load_corpus", lambda: CORPUS)
    path = tmp_path / "results" / "quick.json"
    convergence.main(["--quick", "--seeds", "0", "--out", str(tmp_path), "--json", str(path)])
    assert "SOAP, control arm" in capsys.readouterr().out
    results = json.loads(path.read_text())
    assert results["settings"]["warmup"] == 6
    assert results["machine"]["versions"]["torch"] == torch.__version__
    assert len(results["runs"]) == 9  # two grids of two, AdamW longer, four shorter schedules
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_made_up_results_with_a_broken_run_can_be_drawn(tmp_path: Path) -> None:
    _, arms, lengths = study_of(MadeUp())
    arms["klsoap"]["curves"], arms["klsoap"]["final"] = [[], []], [math.inf, math.inf]
    convergence.plot(arms, lengths, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
