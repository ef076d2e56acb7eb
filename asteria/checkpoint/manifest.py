"""What a state dict says of itself: whose it is, and in which format.

It stands in every parameter group, as ``"asteria": "soap/1"``, because that is what torch's and
other people's handling of state dicts keeps, flattened or not. A slim state says that it is one,
``"soap/1/slim"``, for torch's functions put what the loader has where the file has nothing. One
whose factors are given in the coordinates of their bases is ``"soap/1/rotated"``: keys and shapes
are the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from asteria.algorithms.algorithm import Algorithm
from asteria.algorithms.kl import KLSOAP, KLShampoo
from asteria.algorithms.soap import SOAP
from asteria.errors import CheckpointError

__all__ = ["KEY", "has_rotated_factors", "is_slim", "manifest", "manifest_problems", "rule_of"]

KEY = "asteria"
"""Of the manifest in a parameter group."""
_FORMAT = 1
"""Raised when keys, shapes or what they mean change."""
_SLIM = "/slim"
_ROTATED = "/rotated"
_RULES: dict[str, Algorithm] = {rule.name: rule for rule in (SOAP(), KLShampoo(), KLSOAP())}


def manifest(rule: Algorithm, *, slim: bool = False) -> str:
    """What the groups of an optimizer with this rule say, or those of its ``slim`` state."""
    form = _SLIM if slim else _ROTATED if rule.in_bases else ""
    return f"{rule.name}/{_FORMAT}{form}"


def is_slim(group: Mapping[str, Any]) -> bool:
    """Whether bases and factors were left out of the state of a group, whatever is there now."""
    return str(group.get(KEY, "")).endswith(_SLIM)


def has_rotated_factors(group: Mapping[str, Any]) -> bool:
    """Whether factors in the state of a group are given in the coordinates of their bases."""
    return str(group.get(KEY, "")).endswith(_ROTATED)


def manifest_problems(groups: Iterable[Mapping[str, Any]], rule: Algorithm) -> Iterator[str]:
    """Why the state of ``groups`` is not for an optimizer with this rule; a line for each reason.

    A group that says nothing is taken at its keys.
    """
    for number, group in enumerate(groups):
        if group.get(KEY, manifest(rule)) in (manifest(rule), manifest(rule, slim=True)):
            continue
        name, version = _read(group)
        if version is None:
            yield f"group {number}: {KEY} is {group[KEY]!r:.60}, needs {manifest(rule)!r}"
            continue
        if name != rule.name:
            yield f"group {number}: the state is one of {name}, this optimizer is {rule.name}"
        if version > _FORMAT:
            yield (
                f"group {number}: the state is of format {version}, this version of asteria reads "
                f"formats up to {_FORMAT}; update it"
            )


def rule_of(group: Mapping[str, Any]) -> Algorithm:
    """The rule that the state of a group belongs to; raises CheckpointError if it does not say."""
    name, version = _read(group)
    if name not in _RULES or version is None or version > _FORMAT:
        raise CheckpointError(
            f"a state dict of an asteria optimizer was needed, of format {_FORMAT} or older; its "
            f"groups have {KEY!r}: {'nothing' if KEY not in group else repr(group[KEY])}"
        )
    return _RULES[name]


def _read(group: Mapping[str, Any]) -> tuple[str, int | None]:
    """(name of the rule, format); no format if there is no manifest or it cannot be read."""
    text = str(group.get(KEY, "")).removesuffix(_SLIM).removesuffix(_ROTATED)
    name, _, version = text.partition("/")
    return name, int(version) if version.isdecimal() else None
