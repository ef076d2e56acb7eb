"""Training runs: the same bits every time, and results that are stored once."""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import asteria
from benchmarks import runs
from benchmarks.measurement import read_stats
from benchmarks.runs import Lab, Run, Task
from examples import train_gpt
from tests.benchmarks.tiny import CORPUS, TASK, Bar, quiet

ADAMW = Run(optimizer="adamw", lr=1e-3, steps=4, warmup=2)
SOAP = Run(optimizer="soap", preset="reference", lr=3e-3, steps=4, warmup=2)


def test_a_run_gives_the_same_bits_twice() -> None:
    first, second = (runs.execute(SOAP, TASK, CORPUS, quiet) for _ in range(2))
    assert first["loss"] == second["loss"]
    assert first["final"] == second["final"]
    assert len(first["optimizer_s"]) == SOAP.steps
    assert first["validation"][-1][0] == SOAP.steps


def test_a_run_learns_what_the_example_learns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(optimizer="klshampoo", lr=6e-3, steps=6, seed=1, warmup=1)
    monkeypatch.setattr(train_gpt, "MODEL", {"context": 8, "width": 8, "layers": 1, "heads": 2})
    monkeypatch.setattr(train_gpt, "BATCH", 2)
    monkeypatch.setattr(train_gpt, "load_corpus", lambda text: CORPUS)
    names = ["--optimizers", run.optimizer, "--seed", "1", "--lr", f"{run.optimizer}={run.lr}"]
    train_gpt.main([*names, "--steps", str(run.steps), "--out", str(tmp_path)])
    saved = torch.load(tmp_path / "klshampoo.pt", weights_only=True)
    assert runs.execute(run, TASK, CORPUS, quiet)["loss"] == saved["curves"]["loss"]


def test_a_run_passes_its_settings_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(train_gpt, "make_optimizer", lambda *a, **options: seen.update(options))
    run = replace(SOAP, runtime=(("staleness", 7),), options=(("shampoo_beta", 0.9),))
    run.make_optimizer(torch.nn.Linear(2, 2))
    assert seen["lr"] == SOAP.lr
    assert seen["shampoo_beta"] == 0.9
    assert seen["runtime"].staleness == 7
    assert seen["runtime"].refresh == "sync"


@pytest.mark.parametrize("lr", [3e-3, 1e30])
def test_a_run_closes_its_optimizer(lr: float, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = []

    def close(optimizer: torch.optim.Optimizer) -> None:
        closed.append(len(optimizer.state))

    monkeypatch.setattr(asteria.SOAP, "close", close, raising=False)
    runs.execute(replace(SOAP, lr=lr), TASK, CORPUS, quiet)
    assert len(closed) == 1
    assert closed[0] > 0


@pytest.mark.parametrize("run", [ADAMW, SOAP])
def test_a_run_that_diverges_has_no_final_loss(run: Run) -> None:
    record = runs.execute(replace(run, lr=1e30, steps=30), TASK, CORPUS, quiet)
    assert record["final"] is None
    assert len(record["loss"]) < 30
    assert runs.final(record) == math.inf


def test_a_stored_run_is_not_executed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bar = Bar(total=2 * ADAMW.steps)
    first = Lab(TASK, CORPUS, tmp_path, bar)(ADAMW)
    assert (bar.n, bar.total) == (ADAMW.steps, 2 * ADAMW.steps)
    monkeypatch.setattr(runs, "execute", None)
    bar = Bar(total=2 * ADAMW.steps)
    assert Lab(TASK, CORPUS, tmp_path, bar)(ADAMW) == json.loads(json.dumps(first))
    assert (bar.n, bar.total) == (0, ADAMW.steps)


def test_a_killed_run_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*args: object) -> None:
        raise KeyboardInterrupt

    lab = Lab(TASK, CORPUS, tmp_path, Bar(total=4))
    with monkeypatch.context() as patch:
        patch.setattr(runs.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            lab(ADAMW)
    assert not list(tmp_path.glob("*.json"))
    assert Lab(TASK, CORPUS, tmp_path, Bar(total=4))(ADAMW)["final"] > 0


def test_other_settings_are_another_result(tmp_path: Path) -> None:
    lab = Lab(TASK, CORPUS, tmp_path, Bar(total=0))
    variants = [
        SOAP,
        replace(SOAP, preset="default"),
        replace(SOAP, seed=1),
        replace(SOAP, runtime=(("staleness", 3),)),
        replace(SOAP, options=(("precondition_frequency", 5),)),
        replace(SOAP, schedule="constant"),
    ]
    paths = {lab.path(run) for run in variants}
    paths.add(Lab(replace(TASK, text=1), CORPUS, tmp_path, Bar(total=0)).path(SOAP))
    assert len(paths) == len(variants) + 1


def test_results_of_another_version_are_counted(tmp_path: Path) -> None:
    lab = Lab(TASK, CORPUS, tmp_path, Bar(total=8))
    lab(SOAP), lab(ADAMW)
    later = Lab(TASK, CORPUS, tmp_path, Bar(total=8))
    later.source += 1
    later(SOAP), later(ADAMW)
    assert later.outdated == 1  # AdamW is torch's


def test_a_frozen_run_is_the_same_until_then_and_refreshes_no_more() -> None:
    run = replace(SOAP, steps=8, options=(("precondition_frequency", 1),))
    whole = runs.execute(run, TASK, CORPUS, quiet)
    frozen = runs.execute(replace(run, frozen_after=3), TASK, CORPUS, quiet)
    assert whole["loss"][:4] == frozen["loss"][:4]
    assert whole["loss"] != frozen["loss"]
    assert frozen["stats"]["refreshes"] < whole["stats"]["refreshes"]


def test_a_perturbed_run_starts_beside_the_same_weights() -> None:
    first, second = SOAP.make_model(TASK), replace(SOAP, perturbation=1e-3).make_model(TASK)
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    distances = torch.cat([(p - q).flatten() for p, q in pairs])
    assert distances.std().item() == pytest.approx(1e-3, rel=0.2)
    assert distances.abs().max() < 1e-2


def test_what_is_not_set_leaves_old_results_valid(tmp_path: Path) -> None:
    """The name that this run had before there were fields for what it does not set."""
    path = Lab(Task(text=7), CORPUS, tmp_path, Bar(0)).path(
        Run(optimizer="soap", lr=1e-3, steps=300)
    )
    assert path.name == "soap_default_300steps_lr0.001_seed0_de99caf9d7.json"


def test_statistics_become_json() -> None:
    stats = runs.execute(SOAP, TASK, CORPUS, quiet)["stats"]
    assert stats["steps"] == SOAP.steps
    assert json.loads(json.dumps(stats)) == stats
    assert runs.execute(ADAMW, TASK, CORPUS, quiet)["stats"] == {}

    @dataclass
    class Stats:
        staleness: dict[tuple[int, int], dict[int, int]]
        wait_s: float

    class Stale:
        def stats(self) -> Stats:
            return Stats(staleness={(128, 512): {2: 40}}, wait_s=0.5)

    assert read_stats(Stale()) == {"staleness": {"(128, 512)": {"2": 40}}, "wait_s": 0.5}
