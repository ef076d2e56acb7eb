"""Matching what a state dict holds to the parameters it is for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from asteria.algorithms.algorithm import Algorithm
from asteria.checkpoint.foreign import (
    Origin,
    adopted_groups,
    adopted_state,
    origin_of,
    origin_problems,
)
from asteria.checkpoint.form import check_form
from asteria.checkpoint.manifest import (
    KEY,
    has_rotated_factors,
    is_slim,
    manifest,
    manifest_problems,
)
from asteria.distributed.sharded_layout import is_sharded
from asteria.errors import CheckpointError
from asteria.linalg.eigenbasis import is_orthogonal
from asteria.optim.checks import group_problems
from asteria.runtime.admission import check_saved
from asteria.runtime.records import ParameterRecord, is_rebuilt
from asteria.runtime.sharded_state import stepped_state

__all__ = ["Named", "loaded_groups", "match_state"]

_COARSEST = 3e-4
"""Of bases that are orthogonal enough to give a factor in them; those in bfloat16 have 2e-3."""

Named: TypeAlias = tuple[int, str, Tensor, dict[str, Any]]
"""(index, name, parameter, group) of one parameter of an optimizer."""


def loaded_groups(
    loaded: Mapping[str, Any], own: Sequence[Mapping[str, Any]], defaults: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The groups of a state dict as ours, for an optimizer whose groups are ``own``.

    Options that they lack have the ``defaults``, or in a foreign state dict our own values. Raises
    CheckpointError if it is no optimizer's state dict, or one of other groups.
    """
    groups = check_form(loaded)["param_groups"]
    found, needed = ([len(group["params"]) for group in each] for each in (groups, own))
    if found != needed:
        check_saved({}, [f"parameter groups have {found} parameters, needs {needed}"])
    origin = origin_of(groups)
    if origin is not Origin.OURS:
        return adopted_groups(origin, groups, own)
    return [{**defaults, **group} for group in groups]


def match_state(
    loaded: Mapping[str, Any],
    groups: list[dict[str, Any]],
    rule: Algorithm,
    known: Iterable[str],
    named: Iterable[Named],
    make_record: Callable[[int, str, Tensor, Mapping[str, Any]], ParameterRecord],
) -> dict[ParameterRecord, Mapping[str, Tensor]]:
    """Records for the state of ``loaded``, checked as a whole against the parameters.

    ``groups`` are those of `loaded_groups`, and then of this optimizer; ``known`` are its options,
    ``rule`` is its rule and ``named`` its parameters. Raises CheckpointError that lists every
    problem.
    """
    state: Mapping[Any, Mapping[str, Any]] = loaded["state"]
    origin = origin_of(loaded["param_groups"])
    problems = origin_problems(origin, rule)
    if not problems:
        problems = [*manifest_problems(groups, rule), *group_problems(groups, known)]
    keys = [(key, group) for group in groups for key in group["params"]]
    nobodys = sorted(state.keys() - {key for key, _ in keys}, key=str)
    matched: dict[ParameterRecord, Mapping[str, Tensor]] = {}
    options_fit = not problems
    for (index, name, parameter, _), (key, group) in zip(named, keys, strict=True):
        if state.get(key) and options_fit:
            record = make_record(index, name, parameter, group)
            try:
                entries = stepped_state(record, state[key])
                if is_slim(group):  # the others are not of this state
                    entries = {k: value for k, value in entries.items() if not is_rebuilt(k)}
                matched[record] = adopted_state(origin, entries, record.route, record.shape)
                rotated = origin is Origin.OURS and has_rotated_factors(group)
                record.has_foreign_factors = rotated != rule.in_bases
                if record.has_foreign_factors:
                    _check_bases(entries)
            except CheckpointError as error:
                problems.append(f"{name}: {error}")
    problems += [f"state of a parameter {key!r} that no group has" for key in nobodys]
    check_saved(matched, problems)
    for group in groups:
        group[KEY] = manifest(rule)
    return matched


def _check_bases(entries: Mapping[str, Any]) -> None:
    """Refuse bases in which no factor can be given, with a CheckpointError.

    Their values tell, for a loader may have written coarse ones into a tensor of float32.
    """
    for key, value in entries.items():
        if key.startswith("basis_") and isinstance(value, Tensor) and value.is_floating_point():
            if not _is_orthogonal(value):
                raise CheckpointError(
                    f"{key} ({value.dtype}) is not orthogonal enough for factors that are to be "
                    "converted, which takes bases that were stored in float32: load it with "
                    'RuntimeConfig(factors="full"), or asteria.slim of it'
                )


def _is_orthogonal(bases: Tensor) -> bool:
    """Whether all of (..., n, n) are; other shapes are refused later. Of shards the dtype tells."""
    if is_sharded(bases):
        return torch.finfo(bases.dtype).eps <= _COARSEST
    if bases.dim() < 2 or bases.shape[-1] != bases.shape[-2] or not bases.numel():
        return True
    square = bases.reshape(-1, *bases.shape[-2:])
    return bool(is_orthogonal(square, bound=_COARSEST).all())
