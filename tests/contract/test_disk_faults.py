"""Disks that fail: a typed error, state that is never wrong, and a run that goes on."""

import contextlib
import errno
import gc
import io
import os
import re
import shutil
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from asteria import SOAP, RuntimeConfig, StoreCorruptError, StoreError, StoreFullError
from asteria.optim.optimizer import SecondOrderOptimizer
from asteria.runtime.engine import Engine
from asteria.runtime.residence import Residence
from asteria.store.array_files import ArrayFiles
from asteria.store.nvme import NvmeTier
from asteria.store.tier import Bytes
from tests.contract.test_state_on_tiers import CASES, EXTENT_BYTES, Case, all_of, on_the_device
from tests.store.places import mounted, start_python
from tests.support.execution import ManualExecutor
from tests.support.tiers import limit_extents
from tests.support.training import assert_same_bits, parameters, train

CASE = CASES["defaults"]
STEPS = 24


class Faults:
    """What a disk is going to do wrong."""

    def __init__(self) -> None:
        self.writes = self.reads = 0
        self.failing: tuple[str, range, int] = ("", range(0), 0)
        """(operation, which of them, number of the error)."""
        self.failed = 0

    def meet(self, operation: str, count: int) -> None:
        what, which, number = self.failing
        if operation == what and count in which:
            self.failed += 1
            raise OSError(number, os.strerror(number))


class FaultyFiles(ArrayFiles):
    faults: Faults

    def write(self, number: int, source: Bytes) -> None:
        self.faults.writes += 1
        self.faults.meet("write", self.faults.writes - 1)
        super().write(number, source)

    def read(self, number: int, target: Bytes) -> None:
        self.faults.reads += 1
        self.faults.meet("read", self.faults.reads - 1)
        super().read(number, target)


class FaultyNvme(NvmeTier):
    """A tier on a real disk, with `faults`."""

    def _open_files(self) -> ArrayFiles:
        self.faults = Faults()
        files = FaultyFiles(self.path, 4)
        files.faults = self.faults
        return files


@pytest.fixture(autouse=True)
def small_extents(monkeypatch: pytest.MonkeyPatch) -> None:
    limit_extents(monkeypatch, EXTENT_BYTES)


class Run:
    """An optimizer with state on a real disk; workers do what waits for them."""

    def __init__(self, path: Path, case: Case = CASE, host_bytes: int = 0, **budgets: Any) -> None:
        self.case = case
        runtime = RuntimeConfig(**case.runtime, host_budget=host_bytes, nvme_path=path, **budgets)
        self.optimizer = case.build("SOAP")
        self.tiers: list[FaultyNvme] = []
        residence = Residence(runtime, nvme=self._open)
        self.optimizer._runtime = runtime
        self.optimizer._engine = Engine(runtime, executor=ManualExecutor(), residence=residence)

    def _open(self, path: Any, budget: int | None) -> FaultyNvme:
        self.tiers.append(FaultyNvme(path, budget_bytes=budget))
        return self.tiers[-1]

    @property
    def tier(self) -> FaultyNvme:
        return self.tiers[0]

    def train(self, first: int, last: int) -> None:
        self.case.train(self.optimizer, range(first, last))

    def train_with_patience(self, first: int, last: int) -> list[StoreError]:
        """Call step() again after an error."""
        errors = []
        for step in range(first, last):
            for _ in range(4):
                try:
                    self.train(step, step + 1)
                    break
                except StoreError as error:
                    errors.append(error)
            else:
                raise errors[-1]
        return errors


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    made = Run(tmp_path)
    yield made
    made.tier.close()


def says_what_to_do(error: BaseException, folder: Path) -> None:
    text = str(error)
    assert str(folder) in text, "where"
    assert re.search(r"asked|needed|were to be", text), "what was asked"
    assert re.search(r"check the disk|free disk space|nvme_path|checkpoint", text), "what to do"


def test_a_healthy_disk_changes_no_bit(run: Run) -> None:
    run.train(0, STEPS)
    assert run.tier.faults.reads > STEPS
    assert_same_bits(all_of(run.optimizer), on_the_device(CASE, "SOAP", STEPS))


# What has been written is spoilt


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 16] ^= 1
    file.write_bytes(content)


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def files_of(tier: NvmeTier) -> list[Path]:
    return [file for file in tier.path.iterdir() if file.name.isdecimal()]


SPOILS: dict[str, Callable[[Path], None]] = {
    "flipped bit": flip_a_bit,
    "truncated": truncate,
    "empty": lambda file: os.truncate(file, 0),
    "deleted": Path.unlink,
}


@pytest.mark.parametrize("spoil", SPOILS)
def test_spoilt_files_are_an_error_and_never_numbers(run: Run, spoil: str) -> None:
    run.train(0, 18)
    for extent in run.optimizer._engine._all():
        extent.door.flush()
    before = [p.detach().clone() for p in run.optimizer.param_groups[0]["params"]]
    for file in files_of(run.tier):
        with contextlib.suppress(FileNotFoundError):  # nobody needs it any more
            SPOILS[spoil](file)
    for _ in range(2):
        with pytest.raises(StoreCorruptError) as raised:
            run.train(18, 19)
        says_what_to_do(raised.value, run.tier.path)
    after = run.optimizer.param_groups[0]["params"]
    assert all(bool((a == b).all()) for a, b in zip(after, before, strict=True))
    with pytest.raises(StoreCorruptError):
        torch.save(run.optimizer.state_dict(), io.BytesIO())


def test_a_folder_that_vanishes_is_an_error(run: Run) -> None:
    run.train(0, 18)
    for extent in run.optimizer._engine._all():
        extent.door.flush()
    shutil.rmtree(run.tier.path)
    with pytest.raises(StoreError) as raised:
        run.train(18, 20)
    says_what_to_do(raised.value, run.tier.path)


# One that recovers


def _faults() -> Iterator[Any]:
    """Single faults here and there, in the sequence of a run's reads and writes."""
    for first in range(5, 300, 97):
        yield ("read", first, errno.EINTR)
        yield ("write", first, errno.ENOSPC)
        yield ("write", first + 11, errno.EIO)


def test_a_disk_that_fails_once_changes_no_bit(tmp_path: Path) -> None:
    """Which operation is the fifth, and how many there are, depends on the disk's threads.

    If it is one of a refresh, or of several that read together, the bases in use stay.
    """
    expected, compared = on_the_device(CASE, "SOAP", STEPS), 0
    for operation, first, number in _faults():
        run = Run(tmp_path)
        run.tier.faults.failing = operation, range(first, first + 1), number
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*lost on disk")
            run.train_with_patience(0, STEPS)
        assert run.tier.faults.failed == 1 or first > 100
        lost = run.optimizer.stats().failures
        assert set(lost) <= {"lost on disk"}
        if not lost:
            assert_same_bits(all_of(run.optimizer), expected)
            compared += run.tier.faults.failed
        run.tier.close()
    assert compared > 2


def test_reads_that_fail_once_outside_refreshes_change_no_bit(tmp_path: Path) -> None:
    case = CASES["synchronous"]
    expected = on_the_device(case, "SOAP", STEPS)
    for first in range(2, 300, 61):
        run = Run(tmp_path, case)
        run.tier.faults.failing = "read", range(first, first + 1), errno.EINTR
        errors = run.train_with_patience(0, STEPS)
        assert run.tier.faults.failed == 1
        for error in errors:
            says_what_to_do(error, run.tier.path)
        assert_same_bits(all_of(run.optimizer), expected)
        run.tier.close()


@pytest.mark.parametrize("case", ["synchronous"])
def test_training_goes_on_in_memory_while_the_disk_takes_nothing(case: str, tmp_path: Path) -> None:
    run = Run(tmp_path, CASES[case])
    run.train(0, 18)
    for extent in run.optimizer._engine._all():
        extent.door._near.budget_bytes = 10**9
    run.tier.faults.failing = "write", range(10**9), errno.ENOSPC
    run.train(18, STEPS)
    assert run.tier.faults.failed > 10
    assert run.optimizer.stats().traffic.failed_writes > 10
    run.tier.faults.failing = "", range(0), 0
    run.train(STEPS, STEPS + 10)
    assert_same_bits(all_of(run.optimizer), on_the_device(CASES[case], "SOAP", STEPS + 10))
    run.tier.close()


# No room


def fill(file: Path) -> None:
    """Let nothing more fit beside it."""
    with contextlib.suppress(OSError), file.open("wb", buffering=0) as stream:
        while stream.write(bytes(1024**2)):
            pass


def test_a_full_disk_is_an_error_that_names_it(tmp_path: Path) -> None:
    with mounted(tmp_path / "small", 64 * 1024**2) as folder:
        run = Run(folder)
        fill(folder / "filler")
        with pytest.raises(StoreFullError) as raised:
            run.train(0, 1)
        says_what_to_do(raised.value, run.tier.path)
        assert "nvme_budget" in str(raised.value)
        run.tier.close()


@pytest.mark.filterwarnings("ignore:a refresh of")
def test_a_disk_that_others_fill_is_no_end_or_one_clear_error(tmp_path: Path) -> None:
    """What state takes is reserved; what refreshes hold beside it may be more than the reserve."""
    with mounted(tmp_path / "small", 64 * 1024**2) as folder:
        run = Run(folder)
        run.train(0, 3)
        fill(folder / "filler")
        try:
            run.train(3, 10)
        except StoreFullError as error:
            says_what_to_do(error, run.tier.path)
        run.tier.close()


def test_a_budget_that_is_too_small_is_refused_before_anything_changes(tmp_path: Path) -> None:
    run = Run(tmp_path, nvme_budget=4096)
    params = run.optimizer.param_groups[0]["params"]
    before = [p.detach().clone() for p in params]
    with pytest.raises(StoreFullError, match="nvme_budget"):
        run.train(0, 1)
    assert all(bool((a == b).all()) for a, b in zip(params, before, strict=True))
    assert not run.optimizer.state
    run.tier.close()


def test_a_folder_that_may_not_be_written_to_is_refused_at_once(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for path in (file, file / "below"):
        with pytest.raises(ValueError, match=f"nvme_path: .*{re.escape(str(file))}"):
            SOAP(parameters(), runtime=RuntimeConfig(nvme_path=path))
    if os.geteuid():
        tmp_path.chmod(0o500)
        with pytest.raises(ValueError, match="nvme_path"):
            SOAP(parameters(), runtime=RuntimeConfig(nvme_path=tmp_path))
        tmp_path.chmod(0o700)


def test_a_disk_that_turns_read_only_says_so(run: Run) -> None:
    run.train(0, 18)
    run.tier.faults.failing = "write", range(10**9), errno.EROFS
    with pytest.raises(StoreError, match="Read-only file system") as raised:
        run.train(18, 20)
    says_what_to_do(raised.value, run.tier.path)


# Folders


def plain(path: Path) -> SecondOrderOptimizer:
    runtime = RuntimeConfig(host_budget=0, nvme_path=path)
    optimizer = SOAP(parameters([(12, 4), (5,)]), shampoo_beta=0.5, runtime=runtime)
    train(optimizer, range(20))
    return optimizer


def test_the_folder_goes_with_the_optimizer(tmp_path: Path) -> None:
    optimizer = plain(tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    optimizer.close()
    del optimizer
    gc.collect()
    for thread in threading.enumerate():
        if thread.name == "asteria close":
            thread.join()
    assert not list(tmp_path.iterdir())


PROGRAM = """
import sys, torch
from tests.contract.test_disk_faults import plain
from pathlib import Path
optimizer = plain(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
"""


def test_the_folder_goes_with_the_process(tmp_path: Path) -> None:
    process = start_python(PROGRAM, str(tmp_path))
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    assert len(list(tmp_path.iterdir())) == 1
    process.communicate("\n")
    assert process.returncode == 0
    assert not list(tmp_path.iterdir())


def test_the_folder_of_a_killed_process_is_reclaimed(tmp_path: Path) -> None:
    process = start_python(PROGRAM, str(tmp_path))
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    (left,) = tmp_path.iterdir()
    alive = plain(tmp_path)
    assert left.exists(), "its process is alive"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    other = plain(tmp_path)
    assert not left.exists()
    assert len(list(tmp_path.iterdir())) == 2
    del alive, other
