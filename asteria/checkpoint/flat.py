"""Flattened state dicts, as torch.distributed.checkpoint makes them for pipelines of models.

Instead of a state for each parameter and groups they have ``state.{parameter}.{key}`` and
``param_groups.{parameter}.{option}``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["is_flat", "joined", "parted"]

_STATE = "state."
_GROUPS = "param_groups."


def is_flat(given: object) -> bool:
    """Whether this is a flattened state dict."""
    return (
        isinstance(given, dict)
        and bool(given)
        and all(isinstance(key, str) and key.startswith((_STATE, _GROUPS)) for key in given)
    )


def parted(flat: Mapping[str, Any]) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """(state, options of its group) of each parameter; what belongs to none has the name "".

    Names of parameters have dots, and so have our keys where a parameter has blocks of several
    shapes; names of options have none.
    """
    state: dict[str, dict[str, Any]] = {}
    groups: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        if key.startswith(_GROUPS):
            name, _, option = key.removeprefix(_GROUPS).rpartition(".")
            groups.setdefault(name, {})[option] = value
    for key, value in flat.items():
        if key.startswith(_STATE):
            name, entry = _split(key.removeprefix(_STATE), groups)
            state.setdefault(name, {})[entry] = value
    return state, groups


def _split(key: str, names: Mapping[str, Any]) -> tuple[str, str]:
    """(parameter, key of its state); no key is only a number."""
    name, entry = key, ""
    while "." in name:
        name, _, last = name.rpartition(".")
        entry = f"{last}.{entry}" if entry else last
        if name in names and not entry.isdecimal():
            return name, entry
    return "", key


def joined(
    state: Mapping[str, Mapping[str, Any]], groups: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """The flattened state dict of what `parted` gives."""
    entries = {
        f"{_STATE}{name}.{key}" if name else _STATE + key: value
        for name, mine in state.items()
        for key, value in mine.items()
    }
    options = {
        f"{_GROUPS}{name}.{option}": value
        for name, mine in groups.items()
        for option, value in mine.items()
    }
    return entries | options
