"""Worker threads keep to their cores, and the training thread keeps its own."""

import ctypes
import os
import shutil
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import TypeVar

import pytest
import torch

from asteria.errors import ConfigError
from asteria.refresh import threads
from asteria.refresh.threads import free_cores, limit_math_threads, lower_priority

T = TypeVar("T")

linux = pytest.mark.skipif(sys.platform != "linux", reason="threads can be set one by one on Linux")
mkl = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="torch without MKL")


def in_thread(function: Callable[[], T]) -> T:
    """What a fresh thread returns."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def counts() -> dict[str, int]:
    """How many threads the calling thread's work gets, by everyone who decides on that."""
    path = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    library = ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD)
    found = {"torch": torch.get_num_threads(), "openmp": library.omp_get_max_threads()}
    if torch.backends.mkl.is_available():
        found["mkl"] = library.MKL_Get_Max_Threads()
    return found


def parallel_work() -> torch.Tensor:
    """Enough for OpenMP's loops, MKL's products and LAPACK to start their threads."""
    numbers = torch.arange(1 << 18, dtype=torch.float32).sin()
    matrix = numbers.view(512, 512)
    return torch.linalg.eigvalsh(matrix @ matrix.T) + numbers.sum()


@linux
def test_a_worker_runs_on_its_own_number_of_threads_and_no_other_thread_notices() -> None:
    expected = parallel_work()
    before = counts()
    limited, go_on = threading.Event(), threading.Event()

    def work() -> list[dict[str, int]]:
        try:
            limit_math_threads(before["torch"] + 2)
            fresh = counts()
            parallel_work()
        finally:
            limited.set()
        go_on.wait()
        return [fresh, counts()]

    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(work)
        limited.wait()
        during, result = counts(), parallel_work()
        go_on.set()
        asked = dict.fromkeys(before, before["torch"] + 2)
        assert answer.result() == [asked, asked], "before and after the worker's first operation"
    assert during == counts() == before
    assert torch.equal(result, expected)
    assert torch.equal(parallel_work(), expected)
    assert in_thread(counts) == before, "what later threads start with"


@linux
def test_two_workers_are_independent() -> None:
    all_limited = threading.Barrier(2, timeout=60)

    def work(count: int) -> dict[str, int]:
        limit_math_threads(count)
        all_limited.wait()
        parallel_work()
        return counts()

    with ThreadPoolExecutor(2) as pool:
        one, three = pool.map(work, [1, 3])
    assert set(one.values()) == {1}
    assert set(three.values()) == {3}


@linux
def test_the_limit_outlives_torch_setting_up_the_thread_and_a_later_global_number() -> None:
    own = torch.get_num_threads()

    def work() -> dict[str, int]:
        limit_math_threads(3)
        in_thread(lambda: torch.set_num_threads(own))
        parallel_work()
        return counts()

    # With a number given, torch writes it into every thread that it sets up.
    torch.set_num_threads(own)
    assert set(in_thread(work).values()) == {3}


@linux
def test_a_limit_can_be_changed() -> None:
    def work() -> list[dict[str, int]]:
        found = []
        for count in (3, 1):
            limit_math_threads(count)
            parallel_work()
            found.append(counts())
        return found

    three, one = in_thread(work)
    assert set(three.values()) == {3}
    assert set(one.values()) == {1}


@linux
@mkl
def test_it_says_what_was_limited() -> None:
    assert in_thread(lambda: limit_math_threads(1)) == ("openmp", "mkl")


@linux
@mkl
@pytest.mark.parametrize(
    ("names", "limited"),
    [([], ()), (["omp_set_num_threads"], ("openmp",)), (["MKL_Set_Num_Threads_Local"], ("mkl",))],
)
def test_what_a_build_of_torch_lacks_is_left_out(
    monkeypatch: pytest.MonkeyPatch, names: list[str], limited: tuple[str, ...]
) -> None:
    (library,) = threads._torch_libraries()
    partial = SimpleNamespace(**{name: getattr(library, name) for name in names})
    monkeypatch.setattr(threads, "_torch_libraries", lambda: [partial])
    assert in_thread(lambda: limit_math_threads(3)) == limited


def test_libraries_that_are_not_there_are_no_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch, "__file__", str(tmp_path / "__init__.py"))
    monkeypatch.setattr(sys, "platform", "win32")
    assert in_thread(lambda: limit_math_threads(2)) == ()


@linux
@pytest.mark.parametrize("other", [True, False])
def test_only_the_library_in_use_is_found_wherever_it_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, other: bool
) -> None:
    (library,) = threads._torch_libraries()
    if other:
        (tmp_path / "lib").mkdir()
        unused = Path(torch.__file__).parent / "lib" / "libtorch.so"
        shutil.copy(unused, tmp_path / "lib" / "libtorch_cpu.so")
    monkeypatch.setattr(torch, "__file__", str(tmp_path / "__init__.py"))
    (moved,) = threads._torch_libraries()
    assert moved._handle == library._handle


@linux
def test_openmp_that_torch_does_not_use_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    other = SimpleNamespace(omp_set_num_threads=lambda count: None)
    monkeypatch.setattr(threads, "_torch_libraries", lambda: [other])
    own = torch.get_num_threads()
    assert in_thread(lambda: limit_math_threads(own + 1)) == ()


@pytest.mark.parametrize("count", [0, -1])
def test_a_count_below_one_is_refused(count: int) -> None:
    with pytest.raises(ConfigError, match=f"at least 1, found {count}"):
        limit_math_threads(count)


def nice() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


@linux
def test_a_worker_gives_way_and_the_training_thread_does_not() -> None:
    own = nice()
    expected = min(own + 5, 19)

    def work() -> list[int | bool]:
        first, then = lower_priority(), nice()
        return [first, then, lower_priority(), nice()]

    assert in_thread(work) == [own < 19, expected, False, expected]
    assert nice() == own == in_thread(nice)


@linux
def test_threads_that_a_worker_starts_give_way_too() -> None:
    def work() -> list[int]:
        lower_priority()
        return [nice(), in_thread(nice)]

    worker, started = in_thread(work)
    assert worker == started


@linux
def test_a_priority_that_may_not_be_changed_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(which: int, who: int, value: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "setpriority", refuse)
    assert in_thread(lower_priority) is False


def test_elsewhere_than_on_linux_priorities_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    changed: list[object] = []
    monkeypatch.setattr(os, "setpriority", lambda *given: changed.append(given), raising=False)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert lower_priority() is False
    assert changed == []


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """A machine of 16 cores; gives it files of control groups."""
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    monkeypatch.setattr(threads, "_CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(threads, "_OWN_CGROUP", tmp_path / "own")

    def write(own: str = "", **files: str) -> None:
        (tmp_path / "own").write_text(own)
        for name, text in files.items():
            path = tmp_path / "cgroup" / FILES[name]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    return write


FILES = {
    "root": "cpu.max",
    "outer": "outer/cpu.max",
    "inner": "outer/inner/cpu.max",
    "quota": "cpu/cpu.cfs_quota_us",
    "period": "cpu/cpu.cfs_period_us",
}


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 16),
        ({"root": "max 100000\n"}, 16),
        ({"root": "400000 100000\n"}, 4),
        ({"root": "390000 100000\n"}, 3),
        ({"root": "50000 100000\n"}, 1),
        ({"root": "3200000 100000\n"}, 16),
        ({"own": "0::/outer/inner\n", "inner": "800000 100000\n", "outer": "max 100000\n"}, 8),
        ({"own": "0::/outer/inner\n", "inner": "max 100000\n", "outer": "600000 100000\n"}, 6),
        ({"own": "0::/outer\n", "inner": "100000 100000\n"}, 16),
        ({"own": "1:cpu:/\n0::/\n", "quota": "-1\n", "period": "100000\n"}, 16),
        ({"own": "1:cpu:/\n0::/\n", "quota": "500000\n", "period": "100000\n"}, 5),
        ({"own": "garbage", "root": "garbage", "quota": "5\n", "period": "0\n"}, 16),
    ],
)
def test_a_containers_quota_counts(
    groups: Callable[..., None], files: dict[str, str], cores: int
) -> None:
    groups(**files)
    assert free_cores(0) == cores


def test_what_training_leaves_over_is_free_and_at_least_one_core(
    groups: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    groups()
    assert [free_cores(count) for count in (1, 12, 15, 16, 99)] == [15, 4, 1, 1, 1]
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert free_cores(2) == 4
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert free_cores(0) == 1
