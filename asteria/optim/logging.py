"""What an optimizer does as numbers for TensorBoard, Weights & Biases and their like."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from asteria.errors import ConfigError
from asteria.optim.optimizer import SecondOrderOptimizer
from asteria.telemetry.counters import Network, Stats

__all__ = ["logging_dict"]

_OF_GROUPS = ("lr", "weight_decay", "precondition_frequency")


def logging_dict(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Scalars to log, such as ``asteria/waits``, by names that begin with ``asteria/``.

    ``wandb.log(asteria.logging_dict(optimizer))`` logs them; so does
    ``writer.add_scalar(name, value, step)`` for each.

    - Every number of `optimizer.stats()` under its own name: counts and seconds, all since the
      optimizer was made.
    - Bytes of state by tier, such as ``asteria/device_bytes`` and ``asteria/nvme_peak_bytes``, and
      what steps have moved between tiers, such as ``asteria/traffic_read_bytes``.
    - Of several ranks their number, what this one has sent and received by class of link, such as
      ``asteria/network_inter_sent_bytes``, and how long it has waited for others.
    - ``asteria/staleness_mean`` and ``asteria/staleness_max``: ages in steps of the bases that
      updates used so far, once there has been any such update.
    - ``asteria/lr``, ``asteria/weight_decay`` and ``asteria/precondition_frequency`` of a single
      parameter group; of several ``asteria/lr/0``, ``asteria/lr/1``, ... A period that is still
      ``"auto"`` is left out until it is a number.

    For the training thread, between two steps. On the CPU it waits for nothing and may be called
    after every step. On an accelerator it waits, as `stats` does, until the device has done all
    that was asked of it: call it where you read the loss. Raises ConfigError if ``optimizer`` is
    none of ours, and NonFiniteGradientError if the device has refused a step.
    """
    if not isinstance(optimizer, SecondOrderOptimizer):
        raise ConfigError(
            "logging_dict needs an optimizer of this package, found "
            f"{type(optimizer).__module__}.{type(optimizer).__name__}; if that is a wrapper, pass "
            "what it wraps (.optimizer in Accelerate and Lightning)"
        )
    scalars = {**_of_stats(optimizer.stats()), **dict(_of_groups(optimizer.param_groups))}
    return {f"asteria/{name}": value for name, value in scalars.items()}


def _of_stats(stats: Stats) -> dict[str, float]:
    scalars = {
        field.name: float(value)
        for field in dataclasses.fields(stats)
        if isinstance(value := getattr(stats, field.name), int | float)
    }
    scalars["visible_s"] = stats.visible_s
    for name, taken in (("bytes", stats.tier_bytes), ("peak_bytes", stats.tier_peak_bytes)):
        scalars |= {f"{tier}_{name}": float(count) for tier, count in taken.items()}
    moved = dataclasses.asdict(stats.traffic)
    scalars |= {f"traffic_{name}": float(value) for name, value in moved.items()}
    scalars |= _of_network(stats.network)
    updates = sum(sum(ages.values()) for ages in stats.staleness.values())
    if updates:
        ages = [(age, n) for by_age in stats.staleness.values() for age, n in by_age.items()]
        scalars["staleness_mean"] = sum(age * n for age, n in ages) / updates
        scalars["staleness_max"] = float(max(age for age, _ in ages))
    return scalars


def _of_network(network: Network) -> dict[str, float]:
    scalars = {"ranks": float(network.ranks), "owned_units": float(network.owned_units)}
    for link, counted in network.links.items():
        values = dataclasses.asdict(counted)
        scalars |= {f"{link}_{name}": float(value) for name, value in values.items()}
    scalars["waits"] = float(sum(waited.count for waited in network.waits))
    scalars["wait_s"] = sum((waited.seconds for waited in network.waits), start=0.0)
    return {f"network_{name}": value for name, value in scalars.items()}


def _of_groups(groups: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, float]]:
    for number, group in enumerate(groups):
        for option in _OF_GROUPS:
            if not isinstance(group[option], str):
                yield option if len(groups) == 1 else f"{option}/{number}", float(group[option])
