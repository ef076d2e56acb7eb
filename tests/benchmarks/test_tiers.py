"""The tiers benchmark: whose turn it is, what is concluded, and that it runs."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import tiers


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """The program sets the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Contender:
    """One that takes so many seconds for everything."""

    def __init__(self, name: str, seconds: float, clock: list[float], log: list[str]) -> None:
        self.name, self.seconds, self.clock, self.log = name, seconds, clock, log

    def write(self) -> None:
        self.log.append(f"{self.name} writes")
        self.clock[0] += self.seconds

    def read(self) -> None:
        self.log.append(f"{self.name} reads")
        self.clock[0] += self.seconds / 2

    def clear(self) -> None:
        self.log.append(f"{self.name} clears")


def test_sides_take_turns_and_the_first_round_does_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, log = [0.0], list[str]()
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    sides = {"ours": Contender("A", 2.0, clock, log), "bare": Contender("B", 1.0, clock, log)}
    rates = tiers.measure(sides, range(3), 10**9)
    first = ["A writes", "B writes", "A reads", "B reads", "A clears", "B clears"]
    second = ["B writes", "A writes", "B reads", "A reads", "B clears", "A clears"]
    assert log == first + second + first
    assert rates["ours"] == {"write": [0.5, 0.5], "read": [1.0, 1.0]}
    found = tiers.conclude(rates, "ours", "bare")
    assert found["write"]["ratio"]["p50"] == 0.5
    assert found["read"]["bare"]["p50"] == 2.0


@pytest.mark.parametrize(("ratio", "met"), [(0.71, True), (0.69, False)])
def test_small_blocks_are_not_judged(ratio: float, met: bool) -> None:
    def entry(value: float) -> dict[str, Any]:
        return {way: {"ratio": {"p50": value}} for way in tiers.WAYS}

    judged = tiers.verdict({"1": entry(0.1), "4": entry(0.9), "16": entry(ratio)})
    assert judged == {"goal": 0.7, "worst": "write, 16 MiB", "ratio": ratio, "met": met}
    assert tiers.verdict({"1": entry(0.1)})["met"]


def test_a_wrong_block_is_not_a_rate() -> None:
    blocks = tiers.Blocks(4096, 2)
    with pytest.raises(RuntimeError, match="not what was written"):
        blocks.check()


def test_the_command_reports_every_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    file = tmp_path / "out" / "tiers.json"
    disk = tmp_path / "disk"
    disk.mkdir()
    sizes = ["--mib", "1", "4", "--total-mib", "8", "--rounds", "2", "--depth", "2"]
    tiers.main([*sizes, "--path", str(disk), "--json", str(file)])
    report = json.loads(file.read_text())
    disk_rates, memory_rates, link_rates = report["tables"].values()
    for entries in (disk_rates, memory_rates):
        assert set(entries) == {"1", "4"}
        assert all(
            len(e[way]["rates"]["ours"]) == 2 for e in entries.values() for way in tiers.WAYS
        )
    assert link_rates == {}
    shown = capsys.readouterr().out
    assert file.with_suffix(".md").read_text() in shown
    assert "not measured: no accelerator" in shown
    assert "least of the disk's rate" in shown
    assert file.with_suffix(".png").stat().st_size > 1000
    assert not list(disk.iterdir())


@pytest.mark.parametrize("option", ["--depth", "--total-mib", "--rounds"])
def test_counts_below_one_are_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tiers.parse_arguments([option, "0"])
    assert "must be at least 1" in capsys.readouterr().err
