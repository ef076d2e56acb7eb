"""How many cores a worker takes, and how readily it gives them up."""

from __future__ import annotations

import ctypes
import math
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import torch

from asteria.errors import ConfigError

__all__ = ["free_cores", "limit_math_threads", "lower_priority", "pause_ended_threads"]

_LIBRARIES = {
    "darwin": ("libtorch_cpu.dylib",),
    "win32": ("torch_cpu.dll", "libiomp5md.dll"),
}
_POLITENESS = 5
"""Added to the nice value: a third of the weight that a thread at 0 has in Linux' scheduler. More
would let a step that waits for a worker wait for all other processes."""
_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUP = Path("/proc/self/cgroup")


def limit_math_threads(count: int) -> tuple[str, ...]:
    """Work that the calling thread gives to torch on the CPU runs on ``count`` threads from now on.

    All other threads keep what they have. Returns the thread pools that were limited, of "openmp"
    (torch's own loops and oneDNN; OpenBLAS too, where it was built with OpenMP) and "mkl". What a
    build of torch does not let set by thread is left as it is: this works on Linux, and does
    nothing for Accelerate on macOS. Called by the thread itself, before or after its first
    operation. Raises ConfigError for a ``count`` below 1, and nothing else.
    """
    if count < 1:
        raise ConfigError(f"a number of threads must be at least 1, found {count}")
    # torch.set_num_threads() would also set what every later thread starts with, and the training
    # thread is such one until its first operation. torch initializes each thread once, when it
    # first asks for the number, and would then overwrite what is set here: so ask now.
    torch.get_num_threads()
    limited = []
    # OpenBLAS on OpenMP (0.3.11 or newer) follows the caller's OpenMP number; its own setters are
    # for the whole process, hence left alone. Numbers above 1 pass through a variable that its
    # callers share: a product elsewhere may at times take this thread's number.
    if _call("omp_set_num_threads", count) and torch.get_num_threads() == count:
        limited.append("openmp")
    # In lower case it is Fortran's, which takes a pointer.
    if _call("MKL_Set_Num_Threads_Local", count):
        limited.append("mkl")
    return tuple(limited)


def _call(symbol: str, count: int) -> bool:
    """Calls a C function of torch's libraries with an int; False if there is none of that name."""
    for library in _torch_libraries():
        # A missing name is an AttributeError, hence the default.
        function = getattr(library, symbol, None)
        if function is not None:
            function(ctypes.c_int(count))
            return True
    return False


def _torch_libraries() -> Iterator[ctypes.CDLL]:
    """The libraries that torch has loaded and that hold, or lead to, OpenMP and MKL."""
    folder = Path(torch.__file__).parent / "lib"
    # Never load a second copy: that one would be limited in place of the one in use.
    mode = getattr(os, "RTLD_NOLOAD", ctypes.DEFAULT_MODE)
    for name in _LIBRARIES.get(sys.platform, ("libtorch_cpu.so",)):
        # By its bare name Linux finds a loaded library also where a distribution has moved it.
        for path in (str(folder / name), name):
            try:
                library = ctypes.CDLL(path, mode=mode)
            except OSError:
                continue
            yield library
            break


def lower_priority() -> bool:
    """The calling thread gives way to the process's main thread when cores are busy.

    Its nice value becomes the main thread's plus 5, and threads that it starts from now on
    inherit that: call it before the first operation, so that the calling thread's OpenMP threads
    do. Calling again changes nothing. Linux only; returns whether the priority was lowered, and
    never raises. There is no way back without privileges.
    """
    if sys.platform != "linux":
        # Elsewhere a nice value belongs to the whole process.
        return False
    thread = threading.get_native_id()
    try:
        # A thread's id is the process's for the main thread.
        nice = min(os.getpriority(os.PRIO_PROCESS, os.getpid()) + _POLITENESS, 19)
        if os.getpriority(os.PRIO_PROCESS, thread) >= nice:
            return False
        os.setpriority(os.PRIO_PROCESS, thread, nice)
    except OSError:
        # A sandbox may forbid it; work goes on at the priority it has.
        return False
    return True


def pause_ended_threads() -> None:
    """Let a thread that comes back from C++ to an ending interpreter sleep, not abort the process.

    Before Python 3.14 such a thread is ended by unwinding its stack; a C++ frame that must not be
    unwound, as those of torch's operations are, calls std::terminate. Only for the very end of a
    process: from then on a C++ error hangs the thread it happens in. Linux only.
    """
    if sys.platform != "linux" or sys.version_info >= (3, 14):
        return
    try:
        set_terminate = ctypes.CDLL("libstdc++.so.6")._ZSt13set_terminatePFvvE
        set_terminate(ctypes.cast(ctypes.CDLL(None).pause, ctypes.c_void_p))
    except (OSError, AttributeError):
        # Another C++ library: the process may end with an abort, after all was done.
        return


def free_cores(training_threads: int) -> int:
    """Logical cores that ``training_threads`` threads leave over, at least 1. Any thread.

    Counted are the cores this process may keep busy, by its affinity and by the CPU quota of its
    container; a quota that is not a whole number is rounded down. Processes that torchrun has
    started on this machine (LOCAL_WORLD_SIZE) share them.
    """
    sharing = os.environ.get("LOCAL_WORLD_SIZE", "1")
    processes = int(sharing) if sharing.isdecimal() and int(sharing) > 0 else 1
    return max(_usable_cores() // processes - training_threads, 1)


def _usable_cores() -> int:
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return min([cores, *_quotas()])


def _quotas() -> Iterator[int]:
    """Cores by the CPU quota of each Linux control group that this process is in."""
    # Version 2. The path is relative to what the container sees, or else absolute on the host and
    # then not there; a quota further up binds as well.
    own = next((s[3:] for s in _read(_OWN_CGROUP).splitlines() if s.startswith("0::")), "/")
    group = _CGROUPS / own.lstrip("/")
    for folder in (group, *group.parents):
        if folder.is_relative_to(_CGROUPS):
            yield from _cores(*_read(folder / "cpu.max").split())
    # Version 1.
    names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
    yield from _cores(*(_read(_CGROUPS / "cpu" / name).strip() for name in names))


def _cores(quota_us: str = "", period_us: str = "") -> Iterator[int]:
    """Whole cores of a quota; none if there is no limit ("max", -1 or no file)."""
    try:
        cores = int(quota_us) / int(period_us)
    except (ValueError, ZeroDivisionError):
        return
    if cores > 0:
        yield math.floor(cores)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except (OSError, ValueError):
        return ""
