"""Checkpoints without bases, factors and refreshes in flight, which are made anew after loading."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from asteria.algorithms.algorithm import Algorithm
from asteria.checkpoint.flat import is_flat, joined, parted
from asteria.checkpoint.form import check_form
from asteria.checkpoint.manifest import KEY, manifest, rule_of
from asteria.errors import ConfigError
from asteria.linalg.modes import transform
from asteria.runtime.records import is_rebuilt
from asteria.runtime.routing import route
from asteria.store.distant import plain

__all__ = ["slim"]

_UNREAD = ("factor_", "shadow_")
"""Whose values are not looked at."""


def slim(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict of an optimizer with moments only, as small as AdamW's; the given one stays.

    The first gradient after loading makes factors and bases, as at a first step, and the moments
    are carried over into them: the run goes on with other bits, and its first bases are of few
    gradients. The first moment loses nothing, it is rotated back into the parameter's space. The
    second moment, and KL-Shampoo's eigenvalues, belong to columns that are gone: they stay as they
    are, and after loading take their places in the new bases by rank.

    For ``optimizer.state_dict()`` and what torch.distributed.checkpoint makes of it: by names of
    parameters, full, flattened. Its loader needs ``asteria.slim`` of its own state as the template.
    Computes on the tensors' devices. Any thread.

    Raises CheckpointError if it is no such state dict.
    """
    if is_flat(state_dict):
        flat, options = parted(state_dict)
        for name in flat.keys() | options.keys():
            group = options.get(name, {})
            rule = rule_of(group)
            options[name] = _marked(group, rule)
            if name in flat:
                flat[name] = _slimmed(flat[name], group, rule)
        return joined(flat, options)
    check_form(state_dict)
    state = dict(state_dict["state"])
    marked_groups = []
    for group in state_dict["param_groups"]:
        rule = rule_of(group)
        marked_groups.append(_marked(group, rule))
        for key in group["params"]:
            if state.get(key):
                state[key] = _slimmed(state[key], group, rule)
    return {**state_dict, "state": state, "param_groups": marked_groups}


def _marked(group: Mapping[str, Any], rule: Algorithm) -> dict[str, Any]:
    return {**group, KEY: manifest(rule, slim=True)}


def _slimmed(
    entries: Mapping[str, Tensor], group: Mapping[str, Any], rule: Algorithm
) -> dict[str, Tensor]:
    entries = {key: t if key.startswith(_UNREAD) else plain(t) for key, t in entries.items()}
    # Copies, for a view would take the memory that it shows a part of into a file with it.
    kept = {key: t.clone() for key, t in entries.items() if not is_rebuilt(key)}
    if "born" not in entries or entries["born"] > entries["step"]:
        return kept  # of a vector, or the bases are still to be made
    for key in kept:
        if key.startswith("exp_avg_sq"):  # else the first moment is in the parameter's space
            suffix = key.removeprefix("exp_avg_sq")
            stack, basis = _projected(entries, suffix, group, rule)
            kept["exp_avg" + suffix] = _back(entries["exp_avg" + suffix], stack, basis)
    return kept


def _projected(
    entries: Mapping[str, Tensor], suffix: str, group: Mapping[str, Any], rule: Algorithm
) -> tuple[tuple[int, ...], list[Tensor | None]]:
    """((blocks, *dims), basis of every mode) of the moments under a suffix."""
    shape = entries["exp_avg" + suffix].shape
    found = {mode: entries.get(f"basis_{mode}{suffix}") for mode in range(len(shape))}
    stacked = any(q is not None and q.dim() == 3 for q in found.values())
    stack = tuple(shape) if stacked else (1, *shape)
    try:
        way = route(shape, group, rule, "a parameter")
    except (ConfigError, KeyError):
        way = None
    # A moment is shaped like its parameter where that is one kind of blocks in order, and then the
    # parameter's shape tells its blocks; else it is shaped like the blocks.
    if way is not None and way.rule is rule:
        shapes = way.entry_shapes(shape)
        if all(key in entries and entries[key].shape == shapes[key] for key in shapes):
            ((_, block, blocks),) = way.extents()
            stack = (blocks, *block.dims)
    matrices = (found.get(mode) for mode in range(len(stack) - 1))
    dtype = entries["exp_avg" + suffix].dtype
    return stack, [None if q is None else q.reshape(-1, *q.shape[-2:]).to(dtype) for q in matrices]


def _back(moment: Tensor, stack: tuple[int, ...], matrices: list[Tensor | None]) -> Tensor:
    """The moment, multiplied on every mode by its matrix (blocks, n, n), in memory of its own."""
    x = moment.reshape(stack).contiguous()
    result = transform(x, matrices, (torch.empty_like(x), torch.empty_like(x)), transpose=False)
    return result.reshape(moment.shape).clone()
