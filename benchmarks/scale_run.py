"""Real processes that train together, for `benchmarks.scale` to be compared with.

An accelerator is emulated: where it would run forward and backward, each process sleeps. Gradients
are drawn once; they are added up over the processes with gloo, and the update is real. Torch has
one thread in the training thread, and asynchronous refreshes one worker.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn import Parameter

import asteria
from benchmarks.measurement import quantile, read_stats
from benchmarks.runs import NEVER

ADAMW, NEVER_REFRESHED, EVERY, SHARED, SHARDS = "adamw", "never", "every", "shared", "shards"
SMALL_BYTES, EXCHANGES = 64, 20
TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What each process trains, and for how long."""

    steps: int
    """Counted, whole periods."""
    period: int = 10
    warm_periods: int = 2
    # All different: equal ones may be kept together by one owner, as their products are batched.
    shapes: tuple[tuple[int, int], ...] = tuple((512 - 4 * n, 16) for n in range(8))
    device_s: float = 0.06
    """Of the emulated forward and backward."""
    staleness: tuple[int, ...] = (0, 2)
    """Of the runs that share refreshes."""

    @property
    def parameters(self) -> int:
        """Elements of all weights."""
        return sum(map(math.prod, self.shapes))

    def ways(self, count: int) -> list[tuple[str, int]]:
        """(way, staleness) of all runs of so many processes."""
        shared = (SHARED, SHARDS) if count > 1 else (SHARED,)
        alone = [(way, 0) for way in (ADAMW, NEVER_REFRESHED, EVERY)]
        return alone + [(way, s) for way in shared for s in self.staleness]


@dataclass(slots=True)
class Times:
    """Of one run on one rank, in seconds."""

    steps_s: list[float] = field(default_factory=list)
    device_s: list[float] = field(default_factory=list)
    """Of them, until the gradients are averaged."""
    update_s: list[float] = field(default_factory=list)
    """Of them, the optimizer's ``step()``."""
    refreshes: int = 0
    """That this rank computed in these steps."""


@dataclass(slots=True)
class Found:
    """On one rank."""

    times: dict[tuple[str, int], Times] = field(default_factory=dict)
    refused: dict[tuple[str, int], str] = field(default_factory=dict)
    """What this version does not do, all ranks alike."""
    small_s: float = 0.0
    """Of averaging a few bytes, with all processes at it."""
    large_s: float = 0.0
    """Of averaging all gradients."""


def run_together(count: int, case: Case) -> list[Found]:
    """So many processes on this machine train, all ways in turn; what is found, by rank.

    Raises what a process raised, or a timeout of theirs.
    """
    # Forking a process that has used OpenMP threads hangs; a server without threads need not.
    forkserver = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if forkserver else "spawn")
    if forkserver:
        context.set_forkserver_preload([__name__])
    with tempfile.TemporaryDirectory(prefix="scale-") as folder:
        with ProcessPoolExecutor(count, context) as pool:
            store = Path(folder) / "store"
            futures = [pool.submit(_train, rank, count, store, case) for rank in range(count)]
            return [future.result() for future in futures]


def _train(rank: int, count: int, store: Path, case: Case) -> Found:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=count,
        timeout=timedelta(seconds=TIMEOUT_S),
    )
    try:
        found = Found()
        for key in case.ways(count):
            try:
                found.times[key] = run(case, *key)
            except asteria.ConfigError as error:
                found.refused[key] = str(error)
        found.small_s = exchange_s(torch.zeros(SMALL_BYTES // 4))
        found.large_s = exchange_s(torch.zeros(case.parameters))
    finally:
        dist.destroy_process_group()
    return found


def exchange_s(payload: torch.Tensor) -> float:
    """Of adding up ``payload`` over all ranks, the lower quartile."""
    seconds = []
    for _ in range(EXCHANGES):
        dist.barrier()
        begin_s = time.perf_counter()
        dist.all_reduce(payload)
        seconds.append(time.perf_counter() - begin_s)
    return quantile(seconds, 0.25)


def run(case: Case, way: str, staleness: int) -> Times:
    """Train one way; only the steady state counts."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    flat = torch.randn(case.parameters, generator=generator)
    fresh = flat.clone()
    sizes = [math.prod(shape) for shape in case.shapes]
    gradients = [
        part.view(shape) for part, shape in zip(flat.split(sizes), case.shapes, strict=True)
    ]
    if way == SHARDS:
        gradients = _sharded(gradients)
    parameters = [Parameter(torch.zeros_like(gradient)) for gradient in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient

    def backward() -> None:
        time.sleep(case.device_s)
        # Gradients move a little, or factors would stay those of one matrix.
        flat.copy_(fresh).add_(torch.randn(1, generator=generator))
        dist.all_reduce(flat)

    with _optimizer(parameters, case, way, staleness) as optimizer:
        return _timed(case, backward, optimizer)


def _sharded(whole: list[torch.Tensor]) -> list[torch.Tensor]:
    """The rows of this rank, as FSDP2 has them; views of ``whole``."""
    rank, count = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (count,))
    return [
        DTensor.from_local(tensor.chunk(count)[rank], mesh, [Shard(0)], run_check=False)
        for tensor in whole
    ]


def _timed(case: Case, backward: Callable[[], None], optimizer: torch.optim.Optimizer) -> Times:
    times, warm = Times(), case.warm_periods * case.period
    before = 0
    for step in range(warm + case.steps):
        begin_s = time.perf_counter()
        backward()
        middle_s = time.perf_counter()
        optimizer.step()
        end_s = time.perf_counter()
        if step == warm - 1:
            before = read_stats(optimizer).get("refreshes", 0)
        if step >= warm:
            times.steps_s.append(end_s - begin_s)
            times.device_s.append(middle_s - begin_s)
            times.update_s.append(end_s - middle_s)
    times.refreshes = read_stats(optimizer).get("refreshes", 0) - before
    return times


@contextlib.contextmanager
def _optimizer(
    parameters: list[Parameter], case: Case, way: str, staleness: int
) -> Iterator[torch.optim.Optimizer]:
    if way == ADAMW:
        yield torch.optim.AdamW(parameters, lr=1e-3)
        return
    settings: dict[str, Any] = {"start": "eigh", "workers": 1, "staleness": staleness}
    if way not in (SHARED, SHARDS):
        settings |= {"refresh": "sync", "process_group": "alone"}
    with asteria.SOAP(
        parameters,
        lr=1e-3,
        precondition_frequency=NEVER if way == NEVER_REFRESHED else case.period,
        runtime=asteria.RuntimeConfig(**settings),
    ) as optimizer:
        yield optimizer
