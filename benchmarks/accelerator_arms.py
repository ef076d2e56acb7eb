"""Training one model with one optimizer: whole steps on a device, timed by the device itself."""

from __future__ import annotations

import contextlib
import gc
import importlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import asteria
from asteria.linalg.eigenbasis import BasisResult, orthogonal_iteration
from asteria.runtime import inline
from benchmarks.contenders import (
    BETAS,
    EPS,
    LR,
    WEIGHT_DECAY,
    heavyball_soap_of,
    pytorch_optimizer_soap_of,
)
from benchmarks.energy import EnergyMeter
from benchmarks.measurement import summarize
from benchmarks.transformers import SIZES, Decoder
from examples.train_gpt import closing

Row = dict[str, Any]
MOST_STEPS = 120
LEAST_STEPS = 10
"""Counted, also if that takes longer than there is time; and a period."""
FIRST_STEPS = 5
"""Not counted: memory is allocated, and refreshes are in flight."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """One optimizer and its settings."""

    name: str
    kind: str = "asteria"
    """``"adamw"``, ``"asteria"``, ``"pytorch_optimizer"`` or ``"heavyball"``."""
    period: int = 1
    runtime: dict[str, Any] = field(default_factory=dict)
    """Fields of the RuntimeConfig, of ours."""

    def build(self, parameters: Sequence[nn.Parameter], max_precond_dim: int) -> Any:
        """The optimizer; raises ImportError where it is not installed."""
        common = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": WEIGHT_DECAY}
        limits = {"period": self.period, "max_precond_dim": max_precond_dim}
        if self.kind == "adamw":
            return torch.optim.AdamW(parameters, fused=True, **common)
        if self.kind == "pytorch_optimizer":
            return pytorch_optimizer_soap_of(parameters, **limits)
        if self.kind == "heavyball":
            optimizer = heavyball_soap_of(parameters, compile_step=False, **limits)
            # A setting of the whole module: to compile takes longer than there is time for.
            importlib.import_module("heavyball").utils.compile_mode = None
            return optimizer
        return asteria.SOAP(
            parameters,
            precondition_frequency=self.period,
            max_precond_dim=max_precond_dim,
            stochastic_rounding=parameters[0].dtype == torch.bfloat16,
            runtime=asteria.RuntimeConfig(start="eigh", **self.runtime),
            **common,
        )


ADAMW = Arm(name="AdamW, fused", kind="adamw")
PLACES: dict[str, dict[str, Any]] = {
    "in the step": {"refresh": "sync", "refresh_method": "ldlr"},
    "by the host": {"refresh_on": "host", "refresh_method": "qr"},
    "beside, on the device": {"refresh_on": "device", "refresh_method": "ldlr"},
}


def ours(place: str, period: int, **runtime: Any) -> Arm:
    """Our SOAP with refreshes at a place of `PLACES`."""
    name = f"asteria, {place}, period {period}"
    name += ", factors rotated" if runtime.get("factors") == "rotated" else ""
    return Arm(name=name, period=period, runtime=PLACES[place] | runtime)


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """What every arm trains on."""

    size: str
    device: torch.device
    micro_batch: int
    """Rows of a forward and backward pass."""
    accumulated: int
    """Such passes for a step."""
    context: int
    max_precond_dim: int
    half: bool = False
    """Weights in bfloat16; else in float32, with a forward pass under autocast."""
    checkpointed: bool = False

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.micro_batch * self.accumulated * self.context

    @property
    def measured(self) -> bool:
        """Whether times say anything: not where the host plays the device."""
        return self.device.type != "cpu"

    def model(self) -> Decoder:
        """With its first weights."""
        torch.manual_seed(0)
        with self.device:
            model = Decoder(SIZES[self.size], checkpointed=self.checkpointed)
        return model.to(torch.bfloat16) if self.half else model

    def tokens_of(self, passes: int) -> list[Tensor]:
        """Random rows for so many forward and backward passes."""
        shape = (self.micro_batch, self.context + 1)
        vocabulary = SIZES[self.size].vocabulary
        return [torch.randint(vocabulary, shape, device=self.device) for _ in range(passes)]


@contextlib.contextmanager
def quick_start() -> Iterator[None]:
    """First bases by one iteration in place of an eigensolver in float64, which takes minutes.

    Only what a step takes later is measured, whatever the bases are.
    """

    def quick(factor: Tensor) -> BasisResult:
        start = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
        return orthogonal_iteration(factor, start.expand_as(factor).contiguous(), sort=True)

    before = inline.eigh_basis
    inline.eigh_basis = quick
    try:
        yield
    finally:
        inline.eigh_basis = before


class _Watch:
    """The ends of steps, by the device's clock; a host that plays the device has its own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[Any] = []

    def mark(self) -> None:
        if self._device.type == "cpu":
            self._marks.append(time.perf_counter())
        else:
            event = torch.Event(self._device, enable_timing=True)
            event.record(torch.accelerator.current_stream(self._device))
            self._marks.append(event)

    def step_ms(self) -> list[float]:
        """Between neighbouring marks, which the device has passed."""
        pairs = zip(self._marks, self._marks[1:], strict=False)
        if self._device.type == "cpu":
            return [1e3 * (after - before) for before, after in pairs]
        return [float(before.elapsed_time(after)) for before, after in pairs]


def synchronize(device: torch.device) -> None:
    """Wait until the device has done everything."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def train(arm: Arm, task: Task, seconds: float) -> Row:
    """Some steps that do not count, then as many as there is time for; a row of the table.

    Where the host plays the device only what was checked is told, and no figure.
    """
    deadline_s = time.monotonic() + seconds
    model = task.model()
    optimizer = arm.build(list(model.parameters()), task.max_precond_dim)
    rows = task.tokens_of(task.accumulated)

    def step() -> None:
        for tokens in rows:
            half = task.measured and not task.half
            with torch.autocast(task.device.type, torch.bfloat16, enabled=half):
                loss = model(tokens) / task.accumulated
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    with closing(optimizer), quick_start(), _no_collector():
        return _measured(arm, task, optimizer, step, deadline_s)


def _measured(
    arm: Arm, task: Task, optimizer: Any, step: Callable[[], None], deadline_s: float
) -> Row:
    meter, watch = EnergyMeter(task.device.index or 0), _Watch(task.device)
    for _ in range(FIRST_STEPS):
        step()
    synchronize(task.device)
    before = _traffic(optimizer)
    joules = meter.joules()
    if task.measured:
        torch.cuda.reset_peak_memory_stats(task.device)
    watch.mark()
    steps, least = 0, max(arm.period, LEAST_STEPS if task.measured else 2)
    while steps < least or (steps < MOST_STEPS and task.measured and time.monotonic() < deadline_s):
        step()
        watch.mark()
        steps += 1
    synchronize(task.device)
    used = meter.joules()
    row: Row = {"arm": arm.name, "kind": arm.kind, "period": arm.period, "steps": steps}
    if not task.measured:
        return row | {"checked": True, "step_ms": None}
    times_ms = watch.step_ms()
    moved = {k: (v - before[k]) / steps for k, v in _traffic(optimizer).items()}
    known = joules is not None and used is not None
    return row | {
        "step_ms": summarize(times_ms),
        "times_ms": times_ms,
        "tokens_per_s": 1e3 * task.tokens * steps / sum(times_ms),
        "peak_bytes": torch.cuda.max_memory_allocated(task.device),
        "reserved_bytes": torch.cuda.max_memory_reserved(task.device),
        "joules_per_step": (used - joules) / steps if known else None,
        "energy_missing": meter.missing,
        "moved_bytes_per_step": moved,
        "tier_bytes": dict(optimizer.stats().tier_bytes) if hasattr(optimizer, "stats") else {},
    }


def _traffic(optimizer: Any) -> dict[str, float]:
    if not hasattr(optimizer, "stats"):
        return {}
    counted = asdict(optimizer.stats().traffic)
    return {name: counted[name] for name in counted if name.endswith("_bytes")}


@contextlib.contextmanager
def _no_collector() -> Iterator[None]:
    """Python's collector runs before and after, not within a step."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def try_arm(arm: Arm, task: Task, seconds: float) -> Row:
    """`train`, with what went wrong in place of figures."""
    try:
        return train(arm, task, seconds)
    except Exception as error:  # the other arms go on
        return {"arm": arm.name, "period": arm.period, "error": f"{type(error).__name__}: {error}"}
    finally:
        gc.collect()
        if task.measured:
            torch.cuda.empty_cache()
