"""Records of parameters: how each is routed and, if it is sharded, stepped."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from asteria.algorithms.algorithm import Algorithm
from asteria.config.hyperparameters import Hyperparameters
from asteria.optim.checks import check_dtype
from asteria.runtime.records import ParameterRecord, Route
from asteria.runtime.routing import route, routing_options
from asteria.runtime.sharded_state import alike
from asteria.runtime.sharding import Sharding, sharding_of, stepped_shape

__all__ = ["make_record", "way_of"]


def way_of(
    name: str, parameter: Tensor, group: Mapping[str, Any], rule: Algorithm, shards: str
) -> tuple[Route, Sharding | None]:
    """The route of what is stepped of a parameter, and how ranks share it.

    ``shards`` is what its group follows if it does not say. Raises ConfigError.
    """
    sharding = sharding_of(name, parameter, group, shards)
    if sharding is not None and not sharding.exact:
        shapes = sharding.shard_shapes
        sharding.alike = alike({shape: route(shape, group, rule, name) for shape in shapes})
    return route(stepped_shape(parameter, sharding), group, rule, name), sharding


def make_record(
    named: tuple[int, str, Tensor, Mapping[str, Any]], rule: Algorithm, shards: str
) -> ParameterRecord:
    """A record without state of (index, name, parameter, group); raises ConfigError."""
    index, name, parameter, group = named
    check_dtype(name, parameter)
    way, sharding = way_of(name, parameter, group, rule, shards)
    return ParameterRecord.of(
        parameter,
        name,
        index,
        route=way,
        options=routing_options(group),
        refresh_steps=Hyperparameters.of(group).precondition_frequency,
        sharding=sharding,
    )
