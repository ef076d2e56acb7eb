"""Matching what a state dict holds to the parameters it is for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

from torch import Tensor

from asteria.optim.checks import group_problems
from asteria.runtime.admission import check_saved
from asteria.runtime.records import ParameterRecord

__all__ = ["Named", "loaded_groups", "match_state", "sizes"]

Named: TypeAlias = tuple[int, str, Tensor, dict[str, Any]]
"""(index, name, parameter, group) of one parameter of an optimizer."""


def sizes(groups: Iterable[Mapping[str, Any]]) -> list[int]:
    """Parameters of each group."""
    return [len(group["params"]) for group in groups]


def loaded_groups(loaded: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The groups of a state dict, with defaults for options that they lack.

    Raises CheckpointError if it is no optimizer's state dict.
    """
    if not loaded.keys() >= {"state", "param_groups"}:
        check_saved({}, [f"found keys {sorted(loaded)}, needs state and param_groups"])
    return [{**defaults, **group} for group in loaded["param_groups"]]


def match_state(
    state: Mapping[Any, Mapping[str, Tensor]],
    groups: list[dict[str, Any]],
    known: Iterable[str],
    named: Iterable[Named],
    make_record: Callable[[int, str, Tensor, Mapping[str, Any]], ParameterRecord],
) -> dict[ParameterRecord, Mapping[str, Tensor]]:
    """Records for the loaded state, checked as a whole against the parameters.

    ``groups`` are the loaded ones, of the same sizes as the optimizer's, whose options are
    ``known`` and whose parameters are ``named``. Raises CheckpointError that lists every problem.
    """
    options = group_problems(groups, known)
    keys = [(key, group) for group in groups for key in group["params"]]
    matched = {
        make_record(index, name, parameter, group): state[key]
        for (index, name, parameter, _), (key, group) in zip(named, keys, strict=True)
        if state.get(key) and not options
    }
    nobodys = sorted(state.keys() - {key for key, _ in keys}, key=str)
    problems = [f"state of a parameter {key!r} that no group has" for key in nobodys]
    check_saved(matched, [*options, *problems])
    return matched
