"""The study of refreshes at every step: which runs it makes, and what it says of made-up ones."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from asteria.linalg import method
from benchmarks import convergence, period_one, runs
from benchmarks.period_one import ARMS, BASELINE, NOISE, Study
from benchmarks.runs import Run
from examples import train_gpt
from tests.benchmarks.tiny import CORPUS, TASK, quiet

STUDY = Study(optimizer="soap", lr=4e-3, steps=300, seeds=(0, 1))


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Studies set the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_arms_change_only_what_they_name() -> None:
    base = STUDY.run(ARMS[BASELINE], 1)
    assert dict(base.runtime) == {"refresh": "sync"}
    assert base.options == (("precondition_frequency", 1),)
    assert (base.schedule, base.warmup, base.seed) == ("constant", 60, 1)
    assert STUDY.run(ARMS[NOISE], 1) == replace(base, perturbation=1e-6)
    ldlr = replace(base, runtime=(*base.runtime, ("refresh_method", "ldlr")))
    assert STUDY.run(ARMS["ldlr"], 1) == ldlr
    assert STUDY.run(ARMS["ldlr 2"], 1) == replace(ldlr, ldlr_iterations=2)
    assert len({STUDY.run(arm, 0) for arm in ARMS.values()}) == len(ARMS)


def test_a_run_stores_bases_as_its_arm_says_and_undoes_what_it_changed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[int] = []
    real = method.ldlr

    def listening(*given: Any, iterations: int, **options: Any) -> Any:
        seen.append(iterations)
        return real(*given, iterations=iterations, **options)

    monkeypatch.setattr(method, "ldlr", listening)
    run = Run(optimizer="soap", lr=3e-3, steps=3, warmup=1)
    narrow = (("refresh", "sync"), ("refresh_method", "ldlr"), ("state_dtype", "bfloat16"))
    record = runs.execute(replace(run, runtime=narrow, ldlr_iterations=2), TASK, CORPUS, quiet)
    wide = runs.execute(replace(run, runtime=narrow[:2]), TASK, CORPUS, quiet)
    assert set(seen) == {1, 2}
    assert seen == sorted(seen, reverse=True)
    packed = runs.execute(replace(run, runtime=(("factors", "packed"),)), TASK, CORPUS, quiet)
    assert record["state_bytes"] < packed["state_bytes"] < wide["state_bytes"]


def test_gaps_are_paired_by_seed() -> None:
    gaps = {BASELINE: 0.0, NOISE: 0.01, "ldlr": -0.02}
    arms = {name: ARMS[name] for name in gaps}
    of = {STUDY.run(arm, seed): (name, seed) for name, arm in arms.items() for seed in (0, 1)}

    def runner(run: Run) -> dict[str, Any]:
        name, seed = of[run]
        loss = 2 + seed + gaps[name] * (1 + seed)
        return {"final": loss, "optimizer_s": [0.001], "state_bytes": 8, "stats": {}}

    results = period_one.compare(arms, runner, STUDY)
    assert results[BASELINE]["gaps"] == [0, 0]
    assert results["ldlr"]["gaps"] == pytest.approx([-0.02, -0.04])
    assert results["ldlr"]["gap"] == pytest.approx(-0.03)
    assert results["ldlr"]["standard_error"] == pytest.approx(0.01)


def test_the_whole_study_is_one_option_of_convergence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train_gpt, "load_corpus", lambda: CORPUS)
    monkeypatch.setattr(period_one, "set_up", lambda **_: (TASK, CORPUS))
    target = tmp_path / "p.json"
    given = ["--quick", "--seeds", "0", "--arms", "ldlr", "--out", str(tmp_path / "runs")]
    convergence.main(["--period-one", *given, "--json", str(target)])
    report = json.loads(target.read_text())
    assert list(report["arms"]) == [BASELINE, NOISE, "ldlr"]
    assert report["arms"]["ldlr"]["failed"] == [0]
    assert target.with_suffix(".png").stat().st_size > 10_000
    assert "qr, first weights changed by 1e-6" in capsys.readouterr().out


def test_jobs_are_counted_from_one() -> None:
    with pytest.raises(SystemExit):
        period_one.main(["--jobs", "0"])
