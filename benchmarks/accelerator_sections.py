"""The parts of `benchmarks.accelerator`, each in a process and a time box of its own.

A section returns a dict for JSON. Where the host plays the device it does the same on a tiny model
and leaves every figure out.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from asteria.linalg.method import Method, refreshed
from benchmarks.accelerator_arms import (
    ADAMW,
    PLACES,
    Arm,
    Row,
    Task,
    ours,
    quick_start,
    synchronize,
    try_arm,
)
from benchmarks.tiers import on_link
from benchmarks.transformers import SIZES

GIB = 1024**3
PERIODS = (1, 10, 5, 2)
"""What is asked for most comes first: a box may close early."""
LARGEST = ("gpt2-xl", "gpt2-large", "gpt2-medium", "gpt2")
"""Models that are tried, the largest first."""
SMALL_MEMORY_BYTES = 24 * 10**9
SMALL_PERIOD = 5
BESIDE = "beside, on the device"
TOKENS = 2**18
"""Of a step of the 124M model."""
ROOT = Path(__file__).parent.parent


@dataclass(frozen=True, slots=True)
class Box:
    """Where a section runs, and for how long."""

    device: torch.device
    seconds: float
    save: Callable[[dict[str, Any]], None] = lambda found: None
    """Keeps what was found so far, in case that the box is closed."""

    @property
    def measured(self) -> bool:
        """Whether there is an accelerator."""
        return self.device.type != "cpu"

    @property
    def free_bytes(self) -> int:
        """Of the device's memory."""
        return torch.cuda.mem_get_info(self.device)[0] if self.measured else 0


def _task(size: str, box: Box, *, tokens: int = TOKENS, **options: Any) -> Task:
    """A step of about ``tokens`` on the model, in passes whose activations have room."""
    if not box.measured:
        tiny = {"micro_batch": 2, "accumulated": 2, "context": 16, "max_precond_dim": 32}
        return Task(size="tiny", device=box.device, **(options | tiny | {"half": False}))
    model = SIZES[size]
    # Logits in bfloat16 and float32 with their gradients, and what a layer leaves behind.
    per_token = 12 * model.vocabulary + 34 * model.layers * model.width
    rows = max(1, int(0.25 * box.free_bytes / (per_token * model.context)))
    rows = min(rows, max(1, tokens // model.context))
    return Task(
        size=size,
        device=box.device,
        micro_batch=rows,
        accumulated=max(1, tokens // (rows * model.context)),
        context=model.context,
        max_precond_dim=2048,
        **options,
    )


def _run_arms(arms: list[Arm], task: Task, box: Box) -> dict[str, Any]:
    """All arms, each with an equal part of the time that is left."""
    end_s = time.monotonic() + 0.95 * box.seconds
    rows: list[Row] = []
    found: dict[str, Any] = {"model": task.size, "tokens": task.tokens, "rows": rows}
    for number, arm in enumerate(arms):
        print(f"{arm.name} ({number + 1} of {len(arms)})", file=sys.stderr)
        left_s = (end_s - time.monotonic()) / (len(arms) - number)
        rows.append(try_arm(arm, task, left_s))
        box.save(found)
    return found


def training(box: Box) -> dict[str, Any]:
    """The 124M model: fused AdamW, ours at every place and period, and factors that turn."""
    arms = [ours(place, period) for period in PERIODS for place in reversed(PLACES)]
    arms.append(ours(BESIDE, 1, factors="rotated"))
    return _run_arms([ADAMW, *arms], _task("gpt2", box), box)


def peers(box: Box) -> dict[str, Any]:
    """The same model with the SOAP of other packages."""
    arms = [
        Arm(name="pytorch_optimizer SOAP, period 10", kind="pytorch_optimizer", period=10),
        Arm(name="heavyball SOAP, not compiled, period 10", kind="heavyball", period=10),
    ]
    return _run_arms(arms, _task("gpt2", box), box)


def largest(box: Box) -> dict[str, Any]:
    """The largest model that has room with everything on the device."""
    size = next((size for size in LARGEST if _soap_bytes(size) < 0.6 * box.free_bytes), LARGEST[-1])
    arms = [ADAMW, *(ours(place, 10) for place in PLACES)]
    return _run_arms(arms, _task(size, box, tokens=TOKENS // 2), box)


def _soap_bytes(size: str) -> int:
    """Roughly: weights, gradients, two moments, and factors and bases of up to 2048."""
    model = SIZES[size]
    matrices = model.layers * (12 * model.width**2) + model.vocabulary * model.width
    sides = model.layers * 5 * min(model.width, 2048) ** 2
    return 4 * (4 * matrices + 2 * sides)


def small_memory(box: Box) -> dict[str, Any]:
    """A model of a billion weights within 24 GB, beside the same with everything on the device."""
    task = _task("llama-1b", box, tokens=2**15, half=True, checkpointed=True)
    if box.measured:  # one row: its logits alone take 3 GB
        task = replace(task, micro_batch=1, accumulated=task.tokens // task.context)
    arm = ours(BESIDE, SMALL_PERIOD)
    rows = [try_arm(replace(arm, name=f"{arm.name}, all on the device"), task, 0.4 * box.seconds)]
    found: dict[str, Any] = {"model": task.size, "tokens": task.tokens, "rows": rows}
    box.save(found)
    budget: int | None = 0
    if box.measured:
        # Where it has no room with everything on the device, what is free is the budget.
        budget = _close_memory(rows[0], box) if "error" not in rows[0] else None
    within = ours(BESIDE, SMALL_PERIOD, device_budget=budget)
    rows.append(try_arm(replace(within, name=f"{arm.name}, within 24 GB"), task, 0.4 * box.seconds))
    return found | {"device_budget_bytes": budget if box.measured else None}


def _close_memory(whole: Row, box: Box) -> int:
    """Leave this process 24 GB of the device; bytes of them for state, after such a step."""
    free, total = torch.cuda.mem_get_info(box.device)
    foreign = total - free - torch.cuda.memory_reserved(box.device)  # CUDA's own, for one
    allowed = SMALL_MEMORY_BYTES - foreign
    # What is above ends in an error, whatever anybody counts.
    torch.cuda.set_per_process_memory_fraction(allowed / total, box.device)
    beside = int(whole["peak_bytes"]) - int(whole["tier_bytes"]["device"])
    return max(0, int(0.96 * allowed) - beside)


def refreshes(box: Box) -> dict[str, Any]:
    """Milliseconds of a refresh by method and size, alone and in a stack of what a chunk holds."""
    end_s = time.monotonic() + 0.9 * box.seconds
    sizes = (256, 512, 768, 1024, 2048, 4096, 8192) if box.measured else (8,)
    rows = []
    for size, method, blocks in _refresh_cases(sizes):
        if time.monotonic() < end_s:
            rows.append(_refresh_row(method, size, blocks, box))
    return {"rows": rows}


def _refresh_cases(sizes: Sequence[int]) -> Iterator[tuple[int, Method, int]]:
    """(size, method, factors at a time)."""
    methods: tuple[Method, ...] = ("ldlr", "qr", "eigh")
    for size in sizes:
        stack = min(64, max(1, 32 * 1024**2 // (4 * size * size)))
        for method in methods:
            for blocks in {1} if method == "eigh" else sorted({1, stack}):
                yield size, method, blocks


def _refresh_row(method: Method, size: int, blocks: int, box: Box) -> Row:
    row: Row = {"method": method, "size": size, "blocks": blocks, "ms": None}
    try:
        factor, basis = _factors(size, blocks if box.measured else 2, box.device)
        usable = refreshed(factor, basis, method=method, sort=True).usable
        synchronize(box.device)
        if box.measured:
            begin_s, times = time.perf_counter(), 0
            while times < 2 or (time.perf_counter() - begin_s < 0.3 and times < 50):
                refreshed(factor, basis, method=method, sort=True)
                synchronize(box.device)
                times += 1
            row["ms"] = 1e3 * (time.perf_counter() - begin_s) / times
        row["usable"] = bool(usable.all())
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {error}"
    return row


def _factors(size: int, blocks: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Factors (b, n, n) of a falling spectrum, and bases near their own."""
    generator = torch.Generator(device).manual_seed(size)
    shape = (blocks, size, size)
    gradient = torch.randn(shape, generator=generator, device=device)
    gradient *= torch.logspace(0, -2, size, device=device)
    factor = gradient @ gradient.mT / size
    start = torch.eye(size, device=device).expand(shape).contiguous()
    return factor, refreshed(factor, start, method="qr", sort=True).basis


def synchronization(box: Box) -> dict[str, Any]:
    """Whether a step makes the host wait for the device: torch raises where it does."""
    found = {}
    for place in PLACES:
        task = replace(_task("gpt2", box), accumulated=1, micro_batch=1)
        arm = ours(place, 2)
        found[place] = _steps_without_waiting(arm, task)
    return {"waits": found}


def _steps_without_waiting(arm: Arm, task: Task) -> str | None:
    """What waited; None if nothing did."""
    model = task.model()
    with quick_start(), arm.build(list(model.parameters()), task.max_precond_dim) as optimizer:
        (tokens,) = task.tokens_of(1)
        for step in range(10):
            model(tokens).backward()
            if task.measured and step > 3:
                torch.cuda.set_sync_debug_mode("error")
            try:
                optimizer.step()
            except RuntimeError as error:
                return str(error).splitlines()[0]
            finally:
                if task.measured:
                    torch.cuda.set_sync_debug_mode("default")
            optimizer.zero_grad()
    return None


def link(box: Box) -> dict[str, Any]:
    """Bytes a second between host and device, ours and by a bare copy."""
    settings = argparse.Namespace(total_mib=256, rounds=3)
    return {"table": {"16": on_link(16, settings)} if box.measured else None}


def tests(box: Box) -> dict[str, Any]:
    """The tests that need an accelerator; without one they are skipped, and collected at least."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/accelerator", "--tb=short"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=0.95 * box.seconds, check=False
    )
    lines = done.stdout.strip().splitlines()
    return {"passed": done.returncode == 0, "summary": lines[-1] if lines else "", "log": lines}


Section = Callable[[Box], dict[str, Any]]
SECTIONS: dict[str, tuple[float, Section]] = {
    "tests": (60.0, tests),
    "refreshes": (30.0, refreshes),
    "training": (190.0, training),
    "peers": (45.0, peers),
    "largest": (50.0, largest),
    "small memory": (60.0, small_memory),
    "synchronization": (15.0, synchronization),
    "link": (15.0, link),
}
"""Name -> (seconds, what is done)."""
