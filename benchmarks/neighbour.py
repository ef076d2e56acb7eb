"""Whether refresh workers are good neighbours: the training thread's settings and product rate.

    python -m benchmarks.neighbour --json results/neighbour.json

The training thread multiplies matrices in slices of time, alternately while a worker thread sleeps
and while it refreshes 1024-wide factors without a pause. A third kind of slice has a worker that
was not told to keep to its threads, as a plain Python thread would. Reported are medians over all
slices, and the settings of the training thread before, during and after.
"""

import argparse
import ctypes
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from asteria.linalg.verified import verified_refresh
from asteria.refresh.job import Job
from asteria.refresh.pool import WorkerPool
from benchmarks.measurement import (
    describe_machine,
    format_table,
    progress_bar,
    summarize,
    write_json,
)

SIZE, FACTOR = 512, 1024
KINDS = ("no worker", "worker of ours", "plain thread")


def settings() -> dict[str, Any]:
    """What a thread would have to find changed to notice a bad neighbour."""
    found: dict[str, Any] = {
        "torch": torch.get_num_threads(),
        "torch, inter-op": torch.get_num_interop_threads(),
    }
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    for name in ("omp_get_max_threads", "MKL_Get_Max_Threads"):
        function = getattr(library, name, None)
        if function is not None:
            found[name] = function()
    return found


def product_rate(seconds: float, a: torch.Tensor, out: torch.Tensor) -> float:
    """GFLOP/s of the calling thread's products for so long."""
    count, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        torch.mm(a, a, out=out)
        count += 1
    return 2e-9 * a.shape[0] ** 3 * count / elapsed


def refreshing(stop: threading.Event) -> Callable[[], int]:
    """Work that refreshes until it is told to stop; how often it did."""
    factor = torch.randn(1, FACTOR, FACTOR)
    factor = factor @ factor.mT
    basis = torch.eye(FACTOR)[None]

    def work() -> int:
        count = 0
        while not stop.is_set():
            verified_refresh(factor, basis, method="qr", sort=True)
            count += 1
        return count

    return work


def slice_of(kind: str, seconds: float, pool: WorkerPool, a: torch.Tensor) -> dict[str, Any]:
    """The training thread's rate and settings in one slice."""
    out, stop = torch.empty_like(a), threading.Event()
    work = refreshing(stop)
    job = Job(work, name="refresh", urgency=())
    plain = threading.Thread(target=work)
    if kind == "worker of ours":
        pool.submit(job)
    elif kind == "plain thread":
        plain.start()
    try:
        rate = product_rate(seconds, a, out)
        during = settings()
    finally:
        stop.set()
    if kind == "worker of ours":
        pool.wait(job)
    elif kind == "plain thread":
        plain.join()
    return {"kind": kind, "gflops": rate, "during": during}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print a table and write the report."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.neighbour", description=(__doc__ or "").split("\n")[0]
    )
    add = parser.add_argument
    add("--slices", type=int, default=20, help="of each kind (default 20)")
    add("--seconds", type=float, default=0.5, help="of a slice (default 0.5)")
    add("--threads", type=int, default=1, help="of the training thread (default 1)")
    add("--workers", type=int, default=1, help="threads of refreshes (default 1)")
    add("--json", type=Path, help="write the report here")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    a = torch.randn(SIZE, SIZE)
    before, pool = settings(), WorkerPool(args.workers)
    try:
        plan = [kind for _ in range(args.slices) for kind in KINDS]
        slices = [slice_of(kind, args.seconds, pool, a) for kind in progress_bar(plan, "neighbour")]
    finally:
        pool.close()
    rates = {kind: [s["gflops"] for s in slices if s["kind"] == kind] for kind in KINDS}
    alone = statistics.median(rates[KINDS[0]])
    rows = [
        (kind, f"{statistics.median(found):.1f}", f"{statistics.median(found) / alone:.2f}")
        for kind, found in rates.items()
    ]
    print(format_table(("beside the training thread", "GFLOP/s", "of alone"), rows))
    unchanged = all(s["during"] == before for s in slices) and settings() == before
    print(f"settings of the training thread: {before}, {'unchanged' if unchanged else 'CHANGED'}")
    if args.json:
        report = {
            "benchmark": "neighbour",
            "machine": describe_machine(),
            "settings": {k: v for k, v in vars(args).items() if k != "json"},
            "rates": {kind: summarize(found) for kind, found in rates.items()},
            "training_thread": before,
            "unchanged": unchanged,
        }
        write_json(args.json, report)


if __name__ == "__main__":
    main()
