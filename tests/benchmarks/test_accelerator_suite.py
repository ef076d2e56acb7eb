"""The suite for accelerators, as far as it can be looked at without one."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from asteria.runtime import inline
from benchmarks import accelerator, accelerator_sections
from benchmarks.accelerator import SECTIONS, main, run_all, run_in_process, slug
from benchmarks.accelerator_arms import ADAMW, PLACES, Task, ours, quick_start, train, try_arm
from benchmarks.accelerator_plot import plot
from benchmarks.accelerator_report import judge, markdown
from benchmarks.accelerator_sections import Box
from benchmarks.energy import EnergyMeter
from benchmarks.measurement import summarize
from tests.support.execution import FakeClock

HOST = torch.device("cpu")
TINY = Task(size="tiny", device=HOST, micro_batch=2, accumulated=2, context=16, max_precond_dim=32)


# Sections, in their time boxes


def told(status: str = "done", **more: Any) -> dict[str, Any]:
    return {"status": status, "result": {"rows": []}} | more


def test_a_section_that_fails_leaves_the_others_alone() -> None:
    def run(name: str, device: str, seconds: float, most_s: float) -> dict[str, Any]:
        return told("failed", error="CUDA error\nillegal access") if name == "training" else told()

    outcomes = run_all(list(SECTIONS), "cuda:0", run=run)
    assert list(outcomes) == list(SECTIONS)
    assert [n for n, o in outcomes.items() if o["status"] != "done"] == ["training"]


def test_all_sections_keep_within_eight_minutes() -> None:
    assert sum(seconds for seconds, _ in SECTIONS.values()) <= 480
    clock, boxes = FakeClock(), []

    def late(name: str, device: str, seconds: float, most_s: float) -> dict[str, Any]:
        assert seconds <= most_s
        boxes.append(name)
        clock.advance(most_s)
        return told("out of time")

    outcomes = run_all(list(SECTIONS), "cuda:0", run=late, clock=clock)
    assert clock.now_s <= 480
    left_out = [name for name in SECTIONS if name not in boxes]
    assert left_out, "each took longer than its box"
    assert all(outcomes[name]["error"] == "no time was left" for name in left_out)
    assert outcomes["tests"]["seconds"] == SECTIONS["tests"][0] + accelerator.START_S


class Done:
    def __init__(self, returncode: int, stderr: str = "") -> None:
        self.returncode, self.stderr = returncode, stderr


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("end", ["done", "failed", "out of time"])
def test_what_a_process_has_found_is_kept_however_it_ends(
    end: str, saved: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def process(command: list[str], **options: Any) -> Done:
        assert command[3:5] == ["--section", "link"]
        assert options["timeout"] == 20.0
        if saved:
            Path(command[command.index("--out") + 1]).write_text('{"rows": [1]}')
        if end == "out of time":
            raise subprocess.TimeoutExpired(command, 20.0, stderr=b"first arm\nsecond arm")
        return Done(int(end == "failed"), "Traceback\nRuntimeError: broken")

    monkeypatch.setattr(subprocess, "run", process)
    outcome = run_in_process("link", "cuda:0", 10.0, 20.0)
    assert outcome["status"] == end
    assert outcome.get("result") == ({"rows": [1]} if saved else None)
    if end != "done":
        assert outcome["error"].endswith({"failed": "broken"}.get(end, "second arm"))


def test_without_an_accelerator_it_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(name: str, device: str, seconds: float, most_s: float) -> dict[str, Any]:
        rows = [train(ADAMW, TINY, seconds)] if name == "training" else []
        return told(result={"rows": rows, "model": "tiny", "tokens": 64})

    only = ["training", "refreshes"]
    main(["--device", "cpu", "--folder", str(tmp_path), "--only", *only], run=run)
    report = json.loads((tmp_path / "no-accelerator.json").read_text())
    assert report["measured"] is False
    assert {target["value"] for target in report["targets"]} == {None}
    text = (tmp_path / "no-accelerator.md").read_text()
    assert text in capsys.readouterr().out
    assert "There was no accelerator" in text
    assert "| AdamW, fused | not measured | not measured |" in text
    assert "| training | checked, not measured |" in text
    assert not list(tmp_path.glob("*.png"))


def test_a_section_in_its_own_process_writes_what_it_has_found(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    main(["--section", "refreshes", "--device", "cpu", "--seconds", "5", "--out", str(out)])
    rows = json.loads(out.read_text())["rows"]
    assert {row["method"] for row in rows} == {"ldlr", "qr", "eigh"}
    assert all(row["ms"] is None and row["usable"] for row in rows)


def test_names_of_devices_are_names_of_files() -> None:
    assert slug("NVIDIA H200 (SXM)") == "nvidia-h200-sxm"


# What the sections do


def test_training_goes_through_every_place_and_keeps_each_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(accelerator_sections, "PERIODS", (2,))
    saved: list[int] = []
    box = Box(HOST, 5.0, lambda found: saved.append(len(found["rows"])))
    found = accelerator_sections.training(box)
    assert saved == [1, 2, 3, 4, 5]
    assert [row["arm"] for row in found["rows"][1:]] == [
        *(f"asteria, {place}, period 2" for place in reversed(PLACES)),
        "asteria, beside, on the device, period 1, factors rotated",
    ]
    assert all(row["checked"] and row["step_ms"] is None for row in found["rows"])


def test_small_memory_is_tried_with_state_that_moves() -> None:
    found = accelerator_sections.small_memory(Box(HOST, 5.0))
    whole, within = found["rows"]
    assert whole["checked"]
    assert within["checked"]
    assert within["arm"].endswith("within 24 GB")
    assert found["device_budget_bytes"] is None


def test_nothing_waits_where_there_is_no_device() -> None:
    found = accelerator_sections.synchronization(Box(HOST, 5.0))
    assert found == {"waits": dict.fromkeys(PLACES)}


class Large(Box):
    """A device with so much memory, as far as sizes depend on it."""

    free_bytes = 80 * 10**9  # type: ignore[assignment]


@pytest.mark.parametrize("size", ["gpt2", "gpt2-xl", "llama-1b"])
def test_a_step_has_the_tokens_asked_for_in_passes_that_have_room(size: str) -> None:
    task = accelerator_sections._task(size, Large(torch.device("cuda"), 1.0), tokens=2**18)
    assert 2**17 < task.tokens <= 2**18
    assert 1 <= task.micro_batch <= 64
    assert task.measured


def test_the_largest_model_is_one_that_has_room() -> None:
    fitting = [
        s for s in accelerator_sections.LARGEST if accelerator_sections._soap_bytes(s) < 2e10
    ]
    assert fitting[0] == "gpt2-large"


def test_an_arm_that_fails_is_a_row_with_its_error() -> None:
    row = try_arm(ours("in the step", 0), TINY, 1.0)
    assert row["error"].startswith("ConfigError: ")


def test_half_precision_weights_are_rounded_stochastically() -> None:
    task = replace(TINY, half=True)
    parameters = list(task.model().parameters())
    assert {p.dtype for p in parameters} == {torch.bfloat16}
    with ours("in the step", 2).build(parameters, 32) as optimizer:
        assert optimizer.param_groups[0]["stochastic_rounding"]


def test_a_quick_start_ends() -> None:
    before = inline.eigh_basis
    with quick_start():
        basis = inline.eigh_basis(torch.eye(3).unsqueeze(0) * 2)
        assert bool(basis.usable.all())
        assert inline.eigh_basis is not before
    assert inline.eigh_basis is before


# Energy


class Nvml:
    """A driver that counts."""

    def __init__(self, error: Exception | None = None) -> None:
        self.millijoules, self.error = 5000, error

    def nvmlInit(self) -> None: ...

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> int:
        if self.error is not None:
            raise self.error
        return self.millijoules


def test_energy_is_read_where_the_driver_tells() -> None:
    assert EnergyMeter(0, Nvml()).joules() == 5.0
    meter = EnergyMeter(0, Nvml(RuntimeError("Not Supported")))
    assert meter.joules() is None
    assert meter.missing == "the driver does not tell: Not Supported"


def test_energy_is_not_known_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(name: str) -> Any:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr("importlib.import_module", none)
    meter = EnergyMeter(0)
    assert meter.joules() is None
    assert "nvidia-ml-py" in meter.missing


# The report


def row(arm: str, ms: float, last_ms: float | None = None, **more: Any) -> dict[str, Any]:
    times = [ms] * 195 + [ms if last_ms is None else last_ms] * 7
    return {
        "arm": arm,
        "period": int(arm.split()[-1]) if arm.split()[-1].isdigit() else 1,
        "steps": len(times),
        "step_ms": summarize(times),
        "times_ms": times,
        "tokens_per_s": 1e6,
        "peak_bytes": 20e9,
        "reserved_bytes": 21e9,
        "joules_per_step": ms,
        "moved_bytes_per_step": {"uploaded_bytes": 1e6},
    } | more


def outcomes() -> dict[str, Any]:
    beside = "asteria, beside, on the device"
    training = [
        row("AdamW, fused", 100.0),
        row(f"{beside}, period 1", 120.0),
        row("asteria, in the step, period 1", 130.0),
        row(f"{beside}, period 10", 104.0, 156.0),
        {"arm": "asteria, by the host, period 10", "period": 10, "error": "OutOfMemoryError: no"},
    ]
    memory = [row(f"{beside}, period 5, all on the device", 200.0)]
    memory.append(row(f"{beside}, period 5, within 24 GB", 220.0, reserved_bytes=23.5e9))
    refreshes = [
        {"method": "ldlr", "size": 1024, "blocks": 8, "ms": 8.0},
        {
            "method": "eigh",
            "size": 1024,
            "blocks": 1,
            "ms": None,
            "error": "RuntimeError: no\nmore",
        },
    ]
    found = {
        "training": {"rows": training, "model": "gpt2", "tokens": 2**18},
        "small memory": {"rows": memory, "model": "llama-1b", "tokens": 2**15},
        "refreshes": {"rows": refreshes},
        "synchronization": {"waits": {"beside, on the device": None, "by the host": "called item"}},
        "tests": {"passed": True, "summary": "12 passed"},
        "link": {"table": {"16": {"write": {"ours": {"p50": 20.0}, "ratio": {"p50": 0.9}}}}},
    }
    return {k: {"status": "done", "seconds": 1.0, "result": v} for k, v in found.items()}


def test_targets_are_judged_by_what_was_found() -> None:
    values = {t["name"].split(",")[0]: (t["value"], t["met"]) for t in judge(outcomes())}
    assert values == {
        "SOAP with period 1 / fused AdamW": (pytest.approx(1.2), True),
        "p99 / p50 of a step with period 10": (pytest.approx(1.5), False),
        "1B model": (23.5, True),
        "1B model within 24 GB / all on the device": (pytest.approx(1.1), True),
        "operations of a step that wait for the device": (0.0, True),
    }


def test_what_was_not_found_is_no_figure() -> None:
    assert {t["value"] for t in judge({})} == {None}
    broken = outcomes()
    broken["training"] = {"status": "failed", "error": "x", "seconds": 1.0}
    values = [t["value"] for t in judge(broken)]
    assert values[0] is None
    assert values[2] == 23.5


def report() -> dict[str, Any]:
    device = {"name": "GPU", "memory_bytes": 80e9, "cuda": "12.8"}
    return {
        "device": device,
        "measured": True,
        "machine": {"cpu": "C", "cores": 8},
        "sections": outcomes() | {"peers": {"status": "failed", "error": "a\nb", "seconds": 2.0}},
        "targets": judge(outcomes()),
    }


def test_the_text_has_every_figure_and_every_failure() -> None:
    text = markdown(report())
    for line in (
        "| peers | failed: b | 2.0 |",
        "| p99 / p50 of a step with period 10, on the device | 1.05 | 1.50, MISSED |",
        "| AdamW, fused | 100.0 | 100.0 | 100.0 | 202 | 1000000 | 20.00 | 100 | 1.00 | 1.0 |",
        "failed: OutOfMemoryError: no",
        "| 1024 | ldlr | 8 | 8.00 | 1.000 |",
        "| 1024 | eigh | 1 | RuntimeError: no |  |",
        "12 passed",
        "- refreshes by the host: called item",
        "| 16 | write | 20.0 | 0.90 |",
    ):
        assert line in text, line


def test_the_picture_is_drawn_of_what_there_is(tmp_path: Path) -> None:
    plot(report(), tmp_path / "whole.png")
    plot(report() | {"sections": {}}, tmp_path / "empty.png")
    assert all((tmp_path / f"{name}.png").stat().st_size > 10_000 for name in ("whole", "empty"))
