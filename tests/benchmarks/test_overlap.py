"""The overlap benchmark: whose turn it is, what is timed, and what is concluded."""

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import asteria
from benchmarks import overlap, shapes
from benchmarks.overlap import ASYNC, NEVER_REFRESHED, SYNC, Contender, Plan
from benchmarks.runs import NEVER

NAMES = [SYNC, ASYNC, NEVER_REFRESHED]
TINY = shapes.ShapeTable(
    name="tiny", embeddings=((9, 4),), layer=((6, 4), (4,)), layers=2, rest=(), max_precond_dim=8
)


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """The program sets the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that only a test lets pass."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


class Stepper:
    """An optimizer that takes 20 ms."""

    def __init__(self, clock: list[float], log: list[str], name: str) -> None:
        self.clock, self.log, self.name = clock, log, name

    def step(self) -> None:
        self.log.append(self.name)
        self.clock[0] += 0.020


def results_of(**times: tuple[list[float], list[float]]) -> dict[str, Any]:
    """A report on contenders of these times of the whole step and of the optimizer."""
    names = {"sync": SYNC, "beside": ASYNC, "never": NEVER_REFRESHED}
    entries = {
        names[key]: Contender(
            settings="s",
            optimizer=torch.optim.SGD([torch.zeros(1)]),
            forward_backward=lambda step: None,
            step_ms=step_ms,
            visible_ms=visible_ms,
            waits=[0, 2, 1],
        )
        for key, (step_ms, visible_ms) in times.items()
    }
    return overlap.report_on(entries)


# Turns.


def test_turns_have_a_lead_and_whole_periods_and_rotate() -> None:
    turns = Plan(steps=8, block=4, lead=2, skip=3).turns(["a", "b", "c"])
    text = "".join(t.contender.upper() if t.counted else t.contender for t in turns)
    assert text == "aaabbbccc" + "aaAAAAbbBBBBccCCCC" + "bbBBBBccCCCCaaAAAA"
    ends = [number for number, turn in enumerate(turns) if turn.last]
    assert ends == [2, 5, 8, 14, 20, 26, 32, 38, 44]


def test_only_counted_steps_are_kept_and_workers_rest_after_each_turn(
    monkeypatch: pytest.MonkeyPatch, clock: list[float]
) -> None:
    log: list[str] = []
    monkeypatch.setattr(overlap, "come_to_rest", lambda: log.append("rest"))

    def work(step: int) -> None:
        clock[0] += 0.150

    contenders = {
        name: Contender(
            settings="",
            optimizer=Stepper(clock, log, name),  # type: ignore[arg-type]
            forward_backward=work,
            synchronize=lambda: clock.__setitem__(0, clock[0] + 0.001),
        )
        for name in "ab"
    }
    overlap.measure(contenders, Plan(steps=2, block=2, lead=1, skip=1))
    assert log == ["a", "rest", "b", "rest", *"aaa", "rest", *"bbb", "rest"]
    for entry in contenders.values():
        assert entry.steps == 4
        assert entry.step_ms == pytest.approx([172.0, 172.0])
        assert entry.visible_ms == pytest.approx([21.0, 21.0])
        assert entry.waits == [0, 0]


def test_waits_of_counted_steps_are_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = iter([5, 9])
    monkeypatch.setattr(overlap, "read_stats", lambda optimizer: {"waits": next(counts)})
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    entry = Contender(settings="", optimizer=optimizer, forward_backward=lambda step: None)
    entry.step(counted=False)
    entry.step(counted=True)
    assert entry.waits == [4]


def test_rest_comes_when_no_processor_time_is_used(
    monkeypatch: pytest.MonkeyPatch, clock: list[float]
) -> None:
    used = iter([0.0, 0.05, 0.05, 0.08, 0.08, 0.081])
    monkeypatch.setattr(time, "process_time", lambda: next(used))
    monkeypatch.setattr(time, "sleep", lambda s: clock.__setitem__(0, clock[0] + s))
    assert overlap.come_to_rest() == pytest.approx(0.15)
    busy = iter(range(10**6))
    monkeypatch.setattr(time, "process_time", lambda: next(busy))
    with pytest.raises(TimeoutError, match="a worker does not stop"):
        overlap.come_to_rest()


# What is trained.


def test_gradients_of_the_pool_share_few_directions() -> None:
    pool = overlap.make_pool([(40, 30), (7,)], seed=3)
    assert len(pool) == overlap.POOL
    assert [tuple(gradient.shape) for gradient in pool[0]] == [(40, 30), (7,)]
    assert not torch.equal(pool[0][0], pool[1][0])
    again = overlap.make_pool([(40, 30), (7,)], seed=3)
    assert torch.equal(pool[-1][0], again[-1][0])
    singular = torch.linalg.svdvals(torch.cat([gradients[0] for gradients in pool]))
    assert singular[overlap.RANK - 1] > 2 * singular[overlap.RANK]


def test_the_emulated_device_sleeps_and_sets_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    pool = overlap.make_pool([(3, 2)], seed=0)
    parameters, work = overlap.emulate([(3, 2)], pool, 0.15, seed=1)
    work(overlap.POOL + 2)
    assert slept == [0.15]
    assert parameters[0].grad is pool[2][0]
    others, _ = overlap.emulate([(3, 2)], pool, 0.15, seed=1)
    assert torch.equal(parameters[0], others[0])


def test_a_device_trains_the_example() -> None:
    settings = {"context": 8, "width": 8, "layers": 1, "heads": 2}
    parameters, work = overlap.train_on(torch.device("cpu"), settings, batch=2, seed=0)
    work(0)
    first = [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]
    work(overlap.POOL)  # the same bytes again, and nothing left of the last gradients
    assert len(first) == len(parameters)
    for gradient, parameter in zip(first, parameters, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_contenders_differ_in_their_refreshes_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap, "TABLES", {"tiny": TINY})
    monkeypatch.setattr(overlap, "OPTIMIZERS", {"soap": lambda p, **o: Made(p, o)})

    class Made:
        def __init__(self, parameters: list[torch.Tensor], options: dict[str, Any]) -> None:
            self.parameters, self.options = parameters, options

    args = argparse.Namespace(table="tiny", device="cpu", device_ms=0.0, seed=0, period=7)
    args.optimizer = "soap"
    entries = overlap.make_contenders(args, {name: f"config of {name}" for name in NAMES})
    made: list[Any] = [entry.optimizer for entry in entries.values()]
    assert [entry.options["precondition_frequency"] for entry in made] == [7, 7, NEVER]
    assert [entry.options["runtime"] for entry in made] == [f"config of {name}" for name in NAMES]
    assert all(torch.equal(made[0].parameters[0], entry.parameters[0]) for entry in made)
    assert len({id(entry.parameters[0]) for entry in made}) == 3


def test_only_the_asynchronous_contender_has_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asteria, "RuntimeConfig", lambda **fields: fields)
    args = argparse.Namespace(refresh_method="qr", workers=3)
    shared = {"start": "eigh", "refresh_method": "qr"}
    configs = overlap.make_configs(args)
    assert configs[SYNC] == configs[NEVER_REFRESHED] == {"refresh": "sync"} | shared
    assert configs[ASYNC] == {"refresh": "async", "workers": 3} | shared


# What is concluded.


def test_targets_compare_spreads_and_what_the_optimizer_adds() -> None:
    steady, never = [42.0] * 20, [40.0] * 20
    peaks = [40.0] * 9 + [540.0] + [40.0] * 9 + [640.0]
    results = results_of(
        sync=([150 + ms for ms in peaks], peaks),
        beside=([150 + ms for ms in steady], steady),
        never=([150 + ms for ms in never], never),
    )
    verdict = overlap.judge(results, period=10)
    assert verdict["round_ms"] == pytest.approx(550)
    spread, peak, extra = verdict["targets"]
    assert (spread["value"], spread["met"]) == (1.0, True)
    assert peak["value"] > 3
    assert peak["met"]
    assert (extra["value"], extra["met"]) == (pytest.approx(1.05), True)
    slow = results_of(sync=(never, never), beside=(peaks, peaks), never=(never, never))
    assert not any(entry["met"] for entry in overlap.judge(slow, period=10)["targets"])
    assert slow[ASYNC]["waits"] == 3


def test_the_command_line_is_rounded_to_whole_turns(capsys: pytest.CaptureFixture[str]) -> None:
    assert overlap.parse_arguments(["--steps", "41"]).steps == 60
    assert overlap.parse_arguments([]).steps == 200
    with pytest.raises(SystemExit):
        overlap.parse_arguments(["--workers", "0"])
    assert "--workers must be at least 1, found 0" in capsys.readouterr().err


def test_the_program_prints_tables_and_writes_report_and_plot(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    synchronous = asteria.RuntimeConfig(start="eigh")
    closed: list[object] = []
    monkeypatch.setattr(overlap, "TABLES", {"gpt-micro": TINY})
    monkeypatch.setattr(overlap, "make_configs", lambda args: dict.fromkeys(NAMES, synchronous))
    monkeypatch.setattr(overlap, "IDLE_WINDOW_S", 1e-3)
    monkeypatch.setattr(overlap, "IDLE_SHARE", math.inf)
    monkeypatch.setattr(
        asteria.SOAP, "close", lambda optimizer: closed.append(optimizer), raising=False
    )
    path = tmp_path / "results" / "overlap.json"
    words = ["--device", "cpu", "--device-ms", "0", "--steps", "8", "--period", "2"]
    overlap.main([*words, "--json", str(path)])
    assert len(set(map(id, closed))) == 3
    printed = capsys.readouterr().out
    assert "whole step, asynchronous" in printed
    assert printed.count("at most 1.1") == 2
    report = json.loads(path.read_text())
    assert list(report["contenders"]) == NAMES
    for name, entry in report["contenders"].items():
        assert len(entry["times_ms"]["step"]) == len(entry["times_ms"]["visible"]) == 8
        refreshed = entry["stats"]["refreshes"]
        assert (refreshed == report["contenders"][NEVER_REFRESHED]["stats"]["refreshes"]) is (
            name == NEVER_REFRESHED
        )
    assert report["settings"]["lead"] == 2
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
