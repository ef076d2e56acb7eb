"""Whether something has the form of an optimizer's state dict, whoever has written it."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from typing import Any

from asteria.errors import CheckpointError

__all__ = ["check_form"]


def check_form(given: object) -> Mapping[str, Any]:
    """``given``, if it is torch's nested format: state by parameter, and a list of groups.

    Raises CheckpointError that lists what is not. Keys and values are not looked at.
    """
    if isinstance(given, dict) and given.keys() >= {"state", "param_groups"}:
        problems = list(_problems(given["state"], given["param_groups"]))
        if not problems:
            return given
    else:
        found = sorted(map(str, given))[:10] if isinstance(given, dict) else type(given).__name__
        problems = [f"found {found}, needs a dict with state and param_groups"]
    raise CheckpointError(
        "this is no optimizer's state dict, or a flattened one; nothing was loaded:\n  "
        + "\n  ".join(problems)
    )


def _problems(state: object, groups: object) -> Iterator[str]:
    if not isinstance(state, dict):
        yield f"state is {type(state).__name__}, needs a dict"
    else:
        for key, entries in state.items():
            if not _has_names(entries):
                yield f"the state of {key!r:.60} is no dict whose keys are names"
    if not isinstance(groups, list):
        yield f"param_groups is {type(groups).__name__}, needs a list"
        return
    seen: set[Hashable] = set()
    for number, group in enumerate(groups):
        params = group.get("params") if _has_names(group) else None
        if not isinstance(params, list) or not all(isinstance(p, int | str) for p in params):
            yield f"group {number} is no dict of names with a list of params"
            continue
        if len(set(params)) < len(params) or seen.intersection(params):
            yield f"group {number} has a parameter twice"
        seen.update(params)


def _has_names(entries: object) -> bool:
    return isinstance(entries, dict) and all(isinstance(key, str) for key in entries)
