"""What to change if the state has no room or the host cannot keep it fresh."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from asteria.planner.extents import Routed, planned_extents, routed
from asteria.planner.memory import (
    Memory,
    Traffic,
    budgets,
    housed,
    largest_bytes,
    least_needed,
    placed,
)
from asteria.planner.question import Question
from asteria.planner.refreshes import Refreshes, planned_refreshes, refreshes_beside
from asteria.planner.table import readable_bytes, readable_s
from asteria.runtime.claims import working_bytes
from asteria.runtime.narrow import rule_for
from asteria.store.cell import Home
from asteria.store.residency import Item

__all__ = ["suggestions", "warnings_of"]

_BLOCKS = (4096, 2048, 1024, 512)
"""Sides of blocks that are tried, in this order."""


@dataclass(frozen=True, slots=True)
class _Cut:
    """The same model with large dims cut into blocks of at most ``side``."""

    side: int
    ways: Routed

    @property
    def state_bytes(self) -> int:
        return _state_bytes(self.ways)

    @property
    def options(self) -> str:
        return f"large_dims='blocks' with max_precond_dim={self.side}"


def warnings_of(
    question: Question, memory: Memory, traffic: Traffic, refreshes: Refreshes
) -> Iterator[str]:
    """What will not be as it was asked for, though there is room for the state."""
    limit = memory.limits["device"]
    if memory.bytes_at is not None and limit is not None and memory.least_bytes > limit:
        yield (
            f"a step needs {readable_bytes(memory.least_bytes)} of memory at a time, more than the "
            f"{readable_bytes(limit)} there are for it: the budget will not hold"
        )
    if refreshes.is_sustainable is False:
        yield (
            f"this host sustains a refresh every {refreshes.sustainable_period} steps, not every "
            f"{refreshes.period}: a round takes {readable_s(refreshes.round_s)}, so step() will "
            "wait"
        )
    if refreshes.beside and (refreshes.needed_staleness or 0) > refreshes.staleness:
        yield (
            f"the longest single refresh takes {readable_s(refreshes.longest_s)}, "
            f"{refreshes.needed_staleness} steps: step() will wait for it, as staleness is "
            f"{refreshes.staleness}"
        )
    moving_s = max(traffic.link_s, traffic.disk_s)
    if question.step_s is not None and moving_s > question.step_s:
        yield (
            f"moving the state takes {readable_s(moving_s)} a step, longer than the step itself "
            f"({readable_s(question.step_s)})"
        )


def suggestions(
    question: Question, ways: Routed, groups: list[list[Item]], memory: Memory, refreshes: Refreshes
) -> Iterator[str]:
    """What to change, with numbers; nothing if all is well."""
    if memory.bytes_at is None:
        yield from _more_room(question, groups, memory)
        yield from _smaller_state(question, ways, memory)
        yield from _smaller_storage(question, refreshes)
    elif (limit := memory.limits["device"]) is not None and memory.least_bytes > limit:
        budget = "host_budget" if question.machine.shares_memory else "device_budget"
        yield f"raise {budget} to at least {_exactly(memory.least_bytes)}"
        yield from _shorter_steps(question, ways, limit)
    if refreshes.is_sustainable is False:
        yield f"precondition_frequency={refreshes.sustainable_period}, which this host sustains"
        if question.config.refresh_on == "host" and not question.machine.shares_memory:
            yield 'refresh_on="auto" or "device": the device does what the host cannot'
        yield from _shorter_rounds(question, ways, refreshes)
    if refreshes.beside and (refreshes.needed_staleness or 0) > refreshes.staleness:
        yield f"staleness={refreshes.needed_staleness}, or smaller blocks"


def _more_room(question: Question, groups: list[list[Item]], memory: Memory) -> Iterator[str]:
    config, machine = question.config, question.machine
    limits = budgets(config, machine, memory.working_bytes)
    tier = Home.DEVICE if machine.shares_memory else Home.PINNED
    needed = least_needed(groups, limits, tier)
    there = memory.limits["device" if machine.shares_memory else "pinned"] or 0
    if needed is not None:
        more = f"{_exactly(needed)}, {readable_bytes(needed - there)} more than now"
        if machine.host_bytes is not None and needed > machine.host_bytes:
            have = readable_bytes(machine.host_bytes)
            yield f"a host with free memory of {more}; this one has {have}"
        else:
            yield f"raise host_budget to at least {more}"
    with_disk = replace(config, nvme_path=config.nvme_path or "nvme", nvme_budget=None)
    limits = budgets(with_disk, replace(machine, nvme_bytes=None), memory.working_bytes)
    on_disk = least_needed(groups, limits, Home.NVME)
    if on_disk is not None:
        free = machine.nvme_bytes
        lacks = "" if free is None or free >= on_disk else f"; it has {readable_bytes(free)}"
        if config.nvme_path is None:
            yield f"give nvme_path: a folder on a disk with {_exactly(on_disk)} free{lacks}"
        else:
            yield f"raise nvme_budget to at least {_exactly(on_disk)}, on a disk that has it{lacks}"


def _smaller_state(question: Question, ways: Routed, memory: Memory) -> Iterator[str]:
    limits = list(memory.limits.values())
    room = sum(limit or 0 for limit in limits)
    now = _state_bytes(ways)
    cuts = [cut for cut in _cuts(question, ways) if cut.state_bytes < now]
    if not cuts:
        return
    fitting = [cut for cut in cuts if cut.state_bytes + memory.in_flight_bytes <= room]
    best = fitting[0] if fitting else min(cuts, key=lambda cut: cut.state_bytes)
    still = "" if fitting else f", still more than the {readable_bytes(room)} there are"
    yield f"{best.options}: the state then takes {readable_bytes(best.state_bytes)}{still}"


def _smaller_storage(question: Question, refreshes: Refreshes) -> Iterator[str]:
    """Packed factors, or eigenbases in bfloat16, if the state has room then; else both."""
    options: list[dict[str, Any]] = []
    if question.config.factors == "full":
        options.append({"factors": "packed"})
    if question.config.state_dtype != torch.bfloat16 and not question.rule.in_bases:
        options.append({"state_dtype": torch.bfloat16})
    texts = [_stored(question, refreshes, option) for option in options]
    if len(options) > 1 and not any(texts):
        texts = [_stored(question, refreshes, options[0] | options[1])]
    yield from filter(None, texts)


def _stored(question: Question, refreshes: Refreshes, options: Mapping[str, Any]) -> str | None:
    """What RuntimeConfig with these options takes, if the state has room then."""
    config = replace(question.config, **options)
    rule = rule_for(question.rule, config)
    device = torch.device("cpu" if question.machine.shares_memory else "cuda")
    census = planned_extents(routed(question.weights, question.group, rule), device)
    jobs, _ = refreshes_beside(config, question.machine)
    groups = placed(census, refreshes.period, config)
    limits = budgets(config, question.machine, working_bytes(census, refreshes=jobs))
    memory, placement = housed(census, groups, limits, refreshes=jobs)
    if placement is None:
        return None
    asked = ", ".join(f"{name}={value!r}" for name, value in options.items())
    return f"RuntimeConfig({asked}): the state then takes {readable_bytes(memory.state_bytes)}"


def _shorter_steps(question: Question, ways: Routed, limit: int) -> Iterator[str]:
    """Blocks with which a step keeps within the budget; a tile goes through it as a whole."""
    jobs, _ = refreshes_beside(question.config, question.machine)
    for cut in _cuts(question, ways):
        census = planned_extents(cut.ways, torch.device("cpu"))
        groups = placed(census, 1, question.config)
        least = largest_bytes(groups) + working_bytes(census, refreshes=jobs)
        if least <= limit:
            yield f"{cut.options}: a step then needs {readable_bytes(least)} at a time"
            return


def _shorter_rounds(question: Question, ways: Routed, now: Refreshes) -> Iterator[str]:
    tried = []
    for cut in _cuts(question, ways):
        priced = planned_refreshes(
            cut.ways, question.group, question.config, question.machine, question.step_s
        )
        if priced.round_s < now.round_s:
            tried.append((cut, priced))
    if tried:
        sustained = [pair for pair in tried if pair[1].is_sustainable]
        cut, priced = sustained[0] if sustained else min(tried, key=lambda pair: pair[1].round_s)
        yield (
            f"{cut.options}: a round then takes {readable_s(priced.round_s)}, for which this host "
            f"sustains a period of {priced.sustainable_period} steps"
        )


def _cuts(question: Question, ways: Routed) -> Iterator[_Cut]:
    largest = max((size for _, way in ways for t in way.tiles for size in t.shape.dims), default=0)
    for side in _BLOCKS:
        if side < largest:
            group = {**question.group, "large_dims": "blocks", "max_precond_dim": side}
            yield _Cut(side, routed(question.weights, group, question.rule))


def _state_bytes(ways: Routed) -> int:
    known: dict[tuple[int, object], int] = {}
    total = 0
    for weight, way in ways:
        at = (id(way), weight.dtype)
        if at not in known:
            known[at] = way.state_bytes(weight.dtype)
        total += known[at]
    return total


def _exactly(size: int) -> str:
    """Rounded up, as it would be written into a configuration."""
    unit, name = (2**30, "GiB") if size >= 64 * 2**30 else (2**20, "MiB")
    return f"{-(-size // unit)}{name}"
