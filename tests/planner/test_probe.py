"""Measuring a machine: small here, with a clock that the test moves where that decides."""

import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from asteria.errors import ConfigError
from asteria.planner import disk_speed
from asteria.planner.disk_speed import measure_disk
from asteria.planner.machine import Machine
from asteria.planner.measurements import Probe

MIB = 2**20


class Clock:
    """Goes on by itself, so many seconds at each look."""

    def __init__(self, tick_s: float) -> None:
        self.now_s = 0.0
        self.tick_s = tick_s

    def __call__(self) -> float:
        self.now_s += self.tick_s
        return self.now_s


def small(folder: Path, **changes: Any) -> Probe:
    sizes = {"sizes": (16, 32), "exact_sizes": (16,), "file_bytes": 8 * MIB, "copy_bytes": MIB}
    return Probe(folder=folder, **{**sizes, **changes})


def fields(probe: Probe) -> dict[str, Any]:
    return {k: v for _, measure in probe.measurements() for k, v in measure().items()}


def test_a_probe_makes_a_machine_and_leaves_nothing(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    found = fields(small(tmp_path))
    machine = Machine(**found)
    assert [size for size, _ in machine.refresh_s] == [16, 32]
    assert [size for size, _ in machine.exact_s] == [16]
    assert machine.nvme_bytes
    rates = {"disk_read_bytes_per_s", "disk_write_bytes_per_s", "host_copy_bytes_per_s"}
    assert found.keys() >= rates
    assert list(tmp_path.iterdir()) == []
    assert torch.get_num_threads() == threads


def test_refreshes_are_measured_on_a_thread_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, threading.Thread]] = []
    monkeypatch.setattr(
        "asteria.planner.measurements.limit_math_threads",
        lambda count: seen.append((count, threading.current_thread())),
    )
    probe = small(tmp_path)
    found = fields(probe)
    assert {count for count, _ in seen} == {found["math_threads"]}
    assert all(thread is not threading.main_thread() for _, thread in seen)


def test_sizes_that_would_take_too_long_are_left_out(tmp_path: Path) -> None:
    # Every look at the clock is 1 s later, so the next size would take 3 x 8 s.
    found = fields(small(tmp_path, clock=Clock(1.0), most_s=20.0, exact_sizes=(16, 32)))
    assert found["refresh_s"] == ((16, 1.0),)
    found = fields(small(tmp_path, clock=Clock(1.0), most_s=30.0))
    assert found["refresh_s"] == ((16, 1.0), (32, 1.0))


def test_the_rates_of_a_disk(tmp_path: Path) -> None:
    # One look before and one after, and one at each round but the first.
    speed = measure_disk(tmp_path, file_bytes=64 * MIB, most_s=1e9, clock=Clock(0.5))
    assert speed == (64 * MIB / 0.5, 64 * MIB / 0.5)


def test_a_slow_disk_is_measured_for_so_many_seconds_only(tmp_path: Path) -> None:
    speed = measure_disk(tmp_path, file_bytes=256 * MIB, most_s=5.0, clock=Clock(3.0))
    # A round of 64 MiB, a look at 3 s, another round, a look at 6 s: enough. Then the last look.
    assert speed.write_bytes_per_s == 128 * MIB / 9.0


def test_direct_io_is_not_required(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[int] = []
    real = os.open

    def refuse_direct(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if flags & getattr(os, "O_DIRECT", 0):
            raise OSError(errno.EINVAL, "no direct I/O here")
        opened.append(flags)
        return real(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", refuse_direct)
    assert measure_disk(tmp_path, file_bytes=4 * MIB).write_bytes_per_s > 0
    assert opened
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("call", ["pwrite", "preadv", "fsync"])
@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "no space"), KeyboardInterrupt()])
def test_nothing_is_left_behind_by_a_failure(
    call: str, failure: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0

    def fail(*_: object) -> int:
        raise failure

    monkeypatch.setattr(disk_speed.os, call, fail)
    wanted = ConfigError if isinstance(failure, OSError) else KeyboardInterrupt
    with pytest.raises(wanted) as raised:
        measure_disk(tmp_path, file_bytes=4 * MIB)
    if wanted is ConfigError:
        assert str(tmp_path) in str(raised.value)
        assert "no space" in str(raised.value)
    assert list(tmp_path.iterdir()) == []
    if before:
        assert len(os.listdir("/proc/self/fd")) <= before


@pytest.mark.parametrize(("call", "said"), [("pwrite", "full"), ("preadv", "less came back")])
def test_short_transfers_are_no_success(
    call: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_speed.os, call, lambda *_: 512)
    with pytest.raises(ConfigError, match=said):
        measure_disk(tmp_path, file_bytes=4 * MIB)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        measure_disk(tmp_path / "nowhere")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
def test_the_link_to_an_accelerator(tmp_path: Path) -> None:
    assert fields(small(tmp_path))["link_bytes_per_s"] > 1e6
