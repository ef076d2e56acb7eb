"""What was decided on refreshes, for those who launch them, wait for them and tell of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from asteria.config.hyperparameters import Hyperparameters
from asteria.config.refresh_plan import KEY, MEASURING, Choice, is_plan_text, read_plan
from asteria.config.runtime import RuntimeConfig
from asteria.linalg.method import Method
from asteria.refresh.placing import DeviceMethod
from asteria.runtime.records import ParameterRecord, Route, Tile
from asteria.runtime.units import Unit, unit_of

__all__ = ["choice_of", "is_accelerator", "method_aside", "refresh_texts", "shortest_period"]


def is_accelerator(device: torch.device) -> bool:
    """Whether anything can be computed beside the training on ``device``."""
    return device.type != "cpu"


def choice_of(
    config: RuntimeConfig, hyper: Hyperparameters, device: torch.device, dims: tuple[int, ...]
) -> Choice | None:
    """What was decided for blocks of these dims; None if the configuration decides."""
    if config.refresh_on != "auto" or not is_accelerator(device):
        return None
    return read_plan(hyper.refresh_plan).get(dims)


def shortest_period(config: RuntimeConfig, hyper: Hyperparameters, record: ParameterRecord) -> int:
    """Steps between refreshes of those tiles of the record that are refreshed most often."""
    periods = [hyper.precondition_frequency]
    for plan in record.route.tiles:
        choice = choice_of(config, hyper, record.device, plan.shape.dims)
        if choice is not None and choice.period is not None:
            periods.append(choice.period)
    return min(periods)


def refresh_texts(
    config: RuntimeConfig, group: Mapping[str, Any], parameter: Tensor, way: Route
) -> tuple[str, ...]:
    """Where each kind of a parameter's blocks is refreshed, and how, for people.

    Nothing where there is no choice: without eigenbases, and in host memory.
    """
    if not way.rule.has_bases or not is_accelerator(parameter.device):
        return ()
    if config.refresh == "sync" or config.staleness == 0:
        return ("in the step",)
    fixed = "ldlr" if config.method == "auto" else config.method
    plan = group.get(KEY, "")
    texts = []
    for _, shape, _ in way.extents():
        if config.refresh_on == "device":
            texts.append(f"device {fixed}")
        elif config.refresh_on == "host" or config.method == "eigh":
            texts.append("host")
        else:
            choice = read_plan(plan).get(shape.dims) if is_plan_text(plan) else None
            texts.append(str(choice or (plan if plan == MEASURING else "to be decided")))
    return tuple(texts)


def method_aside(
    config: RuntimeConfig, hyper: Hyperparameters, tile: Tile, *, method: Method, turn: int
) -> Method | None:
    """By which a tile is refreshed on its device; None where a worker does it.

    ``method`` is the one for its next refresh, which is its ``turn``-th. Eigensolvers would make
    the host wait for the device.
    """
    device = tile.record.device
    if method == "eigh" or config.refresh_on == "host":
        return None
    found: Method | None = None
    if config.refresh_on == "device":
        found = "ldlr" if is_accelerator(device) else method
    elif is_accelerator(device) and hyper.refresh_plan == MEASURING:
        found = _trial_of(unit_of(tile), turn)
    else:
        choice = choice_of(config, hyper, device, tile.plan.shape.dims)
        if choice is not None and choice.on == "device":
            found = choice.method
    return found if config.method == "auto" or found is None else method


def _trial_of(unit: Unit, turn: int) -> DeviceMethod | None:
    """Which method the device tries at this turn of the unit, while it is measured; None: the host.

    Of the units of a kind, and of the turns of a unit, every other one is the host's.
    """
    number = unit.record.index + unit.ordinal + turn
    if number % 2 == 0:
        return None
    return "ldlr" if number // 2 % 2 == 0 else "qr"
