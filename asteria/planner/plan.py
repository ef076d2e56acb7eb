"""The answer: what will live where, what moves, how fresh it stays and what to change."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from asteria.planner.kinds import Kind
from asteria.planner.machine import Machine
from asteria.planner.memory import CLASSES, Memory, Traffic
from asteria.planner.refreshes import Refreshes
from asteria.planner.table import aligned, readable_bytes, readable_count, readable_s

__all__ = ["Plan"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What training will take; ``str()`` makes a text for people of it."""

    model: str
    optimizer: str
    """Of the rule: ``"soap"``, ``"kl-shampoo"`` or ``"kl-soap"``."""
    parameters: int
    adamw_rule_parameters: int
    """Of them under the AdamW rule, which have no factors."""
    adamw_bytes: int
    """What the moments of AdamW would take, for comparison."""
    kinds: tuple[Kind, ...]
    memory: Memory
    traffic: Traffic
    refreshes: Refreshes
    machine: Machine
    fits: bool
    """Whether there is room for the state."""
    warnings: tuple[str, ...]
    """What will not be as asked for, though the state has room."""
    suggestions: tuple[str, ...]
    """What to change, with numbers."""

    def to_dict(self) -> dict[str, Any]:
        """The same for JSON: dicts, lists, numbers and texts."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        return _report(self)


def _report(plan: Plan) -> str:
    """Paragraphs: parameters, memory, a step, refreshes, what to know and what to change."""
    parts = [_head(plan), _kinds(plan), _memory(plan), "\n".join(_step(plan))]
    for title, lines in (("Note", plan.warnings), ("To change", plan.suggestions)):
        if lines:
            parts.append("\n".join([f"{title}:", *(f"  - {line}" for line in lines)]))
    return "\n\n".join(parts)


def _head(plan: Plan) -> str:
    adamw = readable_count(plan.adamw_rule_parameters)
    return (
        f"{plan.model}: {readable_count(plan.parameters)} parameters, {plan.optimizer}; {adamw} "
        f"of them under the AdamW rule\nrates: {plan.machine.source}"
    )


def _kinds(plan: Plan) -> str:
    """A row for each kind, and one for all vectors that have no factors."""
    rows = [("parameters", "count", "shape", "rule", "state", "treatment")]
    vectors = [kind for kind in plan.kinds if kind.rule == "adamw" and len(kind.shape) < 2]
    for kind in plan.kinds:
        if kind not in vectors:
            shape = "x".join(map(str, kind.shape))
            size = readable_bytes(kind.state_bytes)
            rows.append((kind.name, str(kind.count), shape, kind.rule, size, kind.treatment))
    if vectors:
        count = str(sum(kind.count for kind in vectors))
        size = readable_bytes(sum(kind.state_bytes for kind in vectors))
        rows.append(("vectors and scalars", count, "", "adamw", size, "no factors"))
    return aligned(rows, right=(1, 4))


def _memory(plan: Plan) -> str:
    memory, shared = plan.memory, plan.machine.shares_memory
    tiers = {"device": "memory" if shared else "device", "pinned": "host", "nvme": "nvme"}
    shown = [tier for tier in tiers if memory.limits[tier] != 0]
    classes = [*CLASSES.values()]
    rows = [("state", *classes, "in all", "room")]
    if memory.bytes_at is not None and memory.bytes_at_by_class is not None:
        for tier in shown:
            at = [readable_bytes(memory.bytes_at_by_class[tier][name]) for name in classes]
            size, limit = memory.bytes_at[tier], memory.limits[tier]
            rows.append((tiers[tier], *at, readable_bytes(size), readable_bytes(limit)))
    room = (
        ""
        if plan.fits
        else "does not fit into "
        + " + ".join(f"{tiers[tier]} {readable_bytes(memory.limits[tier])}" for tier in shown)
    )
    at = [readable_bytes(memory.by_class[name]) for name in classes]
    rows.append(("in all", *at, readable_bytes(memory.state_bytes), room))
    within = "within" if memory.working_within else "beside"
    beside = [
        (f"a step's temporary memory, {within} the room", memory.working_bytes),
        ("refreshes in flight", memory.in_flight_bytes),
        ("refreshes that wait on NVMe", memory.waiting_bytes),
        ("what flows through a step", memory.window_bytes),
        ("AdamW's moments would take", plan.adamw_bytes),
    ]
    lines = aligned(
        [(name, readable_bytes(size)) for name, size in beside if size or "NVMe" not in name],
        right=(1,),
    )
    return aligned(rows, right=(1, 2, 3, 4)) + "\n\n" + lines


def _step(plan: Plan) -> Iterator[str]:
    moved, fresh = plan.traffic, plan.refreshes
    if moved.link_bytes:
        yield (
            f"a step moves {readable_bytes(moved.link_bytes)} between host and device, "
            f"{readable_s(moved.link_s)}"
        )
    if moved.disk_read_bytes:
        yield (
            f"a step reads {readable_bytes(moved.disk_read_bytes)} from disk and writes "
            f"{readable_bytes(moved.disk_write_bytes)}, {readable_s(moved.disk_s)}"
        )
    if moved.copied_bytes:
        yield (
            f"a step copies {readable_bytes(moved.copied_bytes)} within memory for refreshes, "
            f"{readable_s(moved.copy_s)}"
        )
    sizes = ", ".join(f"{count} of {size}" for size, count in fresh.factors.items())
    threads = f"{fresh.threads} thread" + "s" * (fresh.threads > 1)
    where = f"{fresh.jobs} x {threads}" if fresh.beside else "inside the step"
    yield (
        f"a round of refreshes: {readable_s(fresh.round_s)} of work ({where}), the longest "
        f"{readable_s(fresh.longest_s)}"
    )
    if fresh.places:
        yield (
            "by estimates that nobody has measured, of these "
            + "; ".join(f"{dims} {place}" for dims, place in fresh.places.items())
        )
        yield f"a round on the device: {readable_s(fresh.device_round_s)}, beside the training"
    yield f"factors: {sizes or 'none'}"
    yield (
        f"first bases: {readable_s(fresh.first_s)} on the host's {plan.machine.cores} cores; "
        f"a basis is used until it is {fresh.oldest_steps} steps old"
    )
    if fresh.sustainable_period is None:
        yield (
            f"every {fresh.period} steps is sustained if a step takes "
            f"{readable_s(fresh.shortest_step_s)} or more"
        )
    else:
        yield (
            f"with steps of {readable_s(fresh.step_s or 0.0)} this host sustains a refresh every "
            f"{fresh.sustainable_period} steps; asked for: {fresh.period}"
        )
