"""Decides for parameters on an accelerator whether host or device refreshes them, and remembers it.

Decided once for each kind of blocks, and written into the parameter group, so that a run that is
resumed repeats it. Where the period is given, shapes and the device's size decide, and not the
clock: the same program has the same bits on the same machine. Where ``precondition_frequency`` is
``"auto"``, which leaves it to the clock anyway, so is the place: first refreshes take turns.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from asteria.config.hyperparameters import check_group
from asteria.config.refresh_plan import KEY, MEASURING, plan_text, read_plan
from asteria.config.runtime import RuntimeConfig
from asteria.refresh.costs import device_seconds, host_seconds, update_seconds
from asteria.refresh.pacing import Pace
from asteria.refresh.placing import DeviceMethod, Kind, Means, choose
from asteria.runtime.choices import is_accelerator
from asteria.runtime.records import ParameterRecord, TilePlan
from asteria.runtime.units import Unit

__all__ = ["Placer", "modelled_kind", "modelled_step_s"]

_UPDATES_IN_A_STEP = 5
"""A step is taken to last so many times as long as its optimizer's products: whoever trains with
fewer tokens has other worries."""
_STREAM_PROCESSORS = 132
"""Of the accelerator that the tables of `asteria.refresh.costs` are for."""
_WORKING_COPIES = 10
"""Matrices of a factor's size that a refresh beside the training has at a time."""
_WORKING_SHARE = 1 / 16
"""Of the device's memory, above which that is too much."""


def _device_speed(device: torch.device) -> float:
    """Of an accelerator, by its name so to say: 1 is that of the tables."""
    if device.type != "cuda":
        return 1.0
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return float(processors) / _STREAM_PROCESSORS


def _memory_bytes(device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    return int(torch.cuda.get_device_properties(device).total_memory)


def _methods_of(config: RuntimeConfig) -> tuple[DeviceMethod, ...]:
    """What the device may use beside the training; eigensolvers would make the host wait."""
    if config.method == "auto":
        return "ldlr", "qr"
    return () if config.method == "eigh" else (config.method,)


def modelled_kind(
    plans: Iterable[TilePlan],
    config: RuntimeConfig,
    *,
    threads: int,
    speed: float,
    memory_bytes: int | None,
    period: int | None,
) -> Kind:
    """A kind of these tiles, of one shape, with the seconds of the tables."""
    tiles = list(plans)
    sizes = tiles[0].shape.factor_sizes()
    blocks = sum(tile.blocks for tile in tiles) / len(tiles)
    host_method: DeviceMethod = "ldlr" if config.method == "ldlr" else "qr"
    working_bytes = 4 * _WORKING_COPIES * max(sizes) ** 2
    fits = memory_bytes is None or working_bytes <= _WORKING_SHARE * memory_bytes
    return Kind(
        dims=tiles[0].shape.dims,
        units=len(tiles),
        host_s=blocks * sum(host_seconds(n, threads, method=host_method) for n in sizes),
        device_s={
            method: blocks * sum(device_seconds(n, method=method, speed=speed) for n in sizes)
            for method in (_methods_of(config) if fits else ())
        },
        period=period,
        host_method=host_method,
    )


class Placer:
    """Writes plans into groups. For the training thread."""

    def __init__(self, config: RuntimeConfig, pace: Pace, *, jobs: int, threads: int) -> None:
        """``jobs``: refreshes by workers at a time, 0 if there are none; ``threads`` of each."""
        self._config = config
        self._pace = pace
        self._jobs = jobs
        self._threads = threads
        self._new = False

    def admit(self) -> None:
        """There are new records."""
        self._new = True

    def begin_step(
        self,
        groups: list[dict[str, Any]],
        records: Callable[[], Mapping[Tensor, ParameterRecord]],
        *,
        measured: bool,
    ) -> None:
        """Decide what is due; ``groups`` are changed in place. Raises ConfigError for bad options.

        ``records`` gives those of all parameters that have state; ``measured``: enough steps were,
        since the latest of them came.
        """
        if self._config.refresh_on != "auto" or not self._jobs or not _methods_of(self._config):
            return
        waiting = [g for g in groups if g.get(KEY) == MEASURING] if measured else []
        if not (self._new or waiting):
            return
        self._new = False
        undecided, known = [], records()
        for number, group in enumerate(groups):
            tiles = dict(_by_dims(group, known))
            if tiles:
                check_group(group, f"group {number}", scheduled=True)
            plan = group.setdefault(KEY, "")
            if not tiles or plan == MEASURING:
                continue
            if group["precondition_frequency"] == "auto" and not plan:
                group[KEY] = MEASURING
            elif not tiles.keys() <= read_plan(plan).keys():
                undecided.append(group)
        for mine in (undecided, waiting):
            if mine:
                self._decide(mine, known)

    def _decide(
        self, groups: list[dict[str, Any]], records: Mapping[Tensor, ParameterRecord]
    ) -> None:
        kinds: list[Kind] = []
        owners: list[dict[str, Any]] = []
        for group in groups:
            for units in dict(_by_dims(group, records)).values():
                kinds.append(self._kind(units, group["precondition_frequency"]))
                owners.append(group)
        measured = any(kind.period is None for kind in kinds)
        step_s = self._pace.step_s if measured else _step_s(records.values())
        choices = choose(kinds, Means(step_s=step_s, jobs=self._jobs))
        for group in groups:
            mine = {
                kind.dims: choice
                for kind, choice, owner in zip(kinds, choices, owners, strict=True)
                if owner is group
            }
            if group["precondition_frequency"] == "auto":
                longest = max(choice.period or 1 for choice in mine.values())
                group["precondition_frequency"] = longest
                mine = {
                    dims: choice._replace(period=None) if choice.period == longest else choice
                    for dims, choice in mine.items()
                }
            # What was decided before stays.
            group[KEY] = plan_text({**mine, **read_plan(group.get(KEY, ""))})

    def _kind(self, units: list[Unit], period: object) -> Kind:
        """With what was seen of it, where the period is to be found out."""
        device = units[0].record.device
        kind = modelled_kind(
            (unit.record.route.tiles[unit.ordinal] for unit in units),
            self._config,
            threads=self._threads,
            speed=_device_speed(device),
            memory_bytes=_memory_bytes(device),
            period=period if isinstance(period, int) else None,
        )
        if kind.period is not None:
            return kind
        seen = {m: self._pace.seconds_aside(units, m) for m in kind.device_s}
        return Kind(
            dims=kind.dims,
            units=kind.units,
            host_s=self._pace.seconds(units) or kind.host_s,
            device_s={method: seen[method] or kind.device_s[method] for method in kind.device_s},
            period=None,
            host_method=kind.host_method,
        )


def _by_dims(
    group: Mapping[str, Any], records: Mapping[Tensor, ParameterRecord]
) -> Iterator[tuple[tuple[int, ...], list[Unit]]]:
    """Units of a group on accelerators, by the dims of their blocks."""
    found: dict[tuple[int, ...], list[Unit]] = {}
    for parameter in group["params"]:
        record = records.get(parameter)
        if record is None or not record.route.rule.has_bases or not is_accelerator(record.device):
            continue
        for plan in record.route.tiles:
            if plan.shape.factor_sizes():
                found.setdefault(plan.shape.dims, []).append(Unit(record, plan.ordinal))
    yield from found.items()


def modelled_step_s(plans: Iterable[TilePlan], speed: float) -> float:
    """Seconds of a step that updates these tiles on an accelerator, by the tables."""
    seconds = 0.0
    for (shape, blocks), count in Counter((plan.shape, plan.blocks) for plan in plans).items():
        one = update_seconds(shape.dims, shape.factor_sizes(), speed=speed)
        seconds += count * blocks * one
    return _UPDATES_IN_A_STEP * seconds


def _step_s(records: Iterable[ParameterRecord]) -> float:
    """Of all parameters on accelerators, one device after the other."""
    plans: dict[torch.device, list[TilePlan]] = {}
    for record in records:
        if is_accelerator(record.device):
            plans.setdefault(record.device, []).extend(record.route.tiles)
    return sum(modelled_step_s(tiles, _device_speed(device)) for device, tiles in plans.items())
