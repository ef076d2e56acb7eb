"""What the ranks that train the same parameters must know the same of each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from asteria.algorithms.algorithm import Algorithm
from asteria.config.hyperparameters import Hyperparameters
from asteria.distributed.sharded_layout import is_sharded
from asteria.optim.loading import Named
from asteria.runtime.peers import Member
from asteria.runtime.records import state_dtype
from asteria.runtime.routing import route, routing_options

__all__ = ["members"]


def members(named: Iterable[Named], rule: Algorithm) -> Iterator[Member]:
    """All parameters that are going to be trained, in order."""
    for index, name, parameter, group in named:
        if not parameter.requires_grad or is_sharded(parameter):
            continue  # shared out when it is unfrozen; sharded ones have owners of their own
        hyper = Hyperparameters.of(group)
        card = f"{rule.name} {index} {tuple(parameter.shape)} {parameter.dtype} {hyper}"
        way = route(parameter.shape, group, rule, name)
        yield Member(index, way, state_dtype(parameter), f"{card} {routing_options(group)}")
