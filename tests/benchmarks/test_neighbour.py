"""The neighbour benchmark: that it runs all kinds of slices and judges the settings."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import neighbour


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = torch.get_num_threads()
    monkeypatch.setattr(neighbour, "FACTOR", 16)
    monkeypatch.setattr(neighbour, "SIZE", 16)
    yield
    torch.set_num_threads(before)


def test_the_command_reports_every_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "report.json"
    neighbour.main(["--slices", "2", "--seconds", "0.02", "--json", str(file)])
    report = json.loads(file.read_text())
    assert set(report["rates"]) == set(neighbour.KINDS)
    assert report["unchanged"]
    assert report["training_thread"]["torch"] == 1
    shown = capsys.readouterr().out
    assert all(kind in shown for kind in neighbour.KINDS)
    assert "unchanged" in shown


def test_changed_settings_are_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = iter(range(100))
    monkeypatch.setattr(neighbour, "settings", lambda: {"torch": next(found)})
    neighbour.main(["--slices", "1", "--seconds", "0.01"])
    assert "CHANGED" in capsys.readouterr().out
