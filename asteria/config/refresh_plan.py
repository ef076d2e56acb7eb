"""Where, how and how often the blocks of a parameter group are refreshed, as a text.

It stands in the group, under `KEY`, so that it is part of every checkpoint:
``"768x3072 device ldlr; 768x768 host qr every 20"``.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Literal, NamedTuple, TypeAlias, cast

__all__ = ["KEY", "MEASURING", "Choice", "RefreshPlan", "is_plan_text", "plan_text", "read_plan"]

KEY = "refresh_plan"
MEASURING = "measuring"
"""Stands for a plan that is made of what refreshes turn out to cost."""

Place = Literal["host", "device"]
_ENTRY = re.compile(r"(\d+(?:x\d+)*) (host|device) (qr|ldlr)(?: every (\d+))?")
_LONGEST = 10_000
"""Characters; no model has so many kinds of blocks."""


class Choice(NamedTuple):
    """For blocks of one shape."""

    on: Place
    method: Literal["qr", "ldlr"]
    period: int | None = None
    """Steps between refreshes, where that is less than the group's; None is the group's."""

    def __str__(self) -> str:
        every = "" if self.period is None else f" every {self.period}"
        return f"{self.on} {self.method}{every}"


RefreshPlan: TypeAlias = Mapping[tuple[int, ...], Choice]
"""By the dims of blocks; those that are missing are refreshed as the configuration says."""


def plan_text(plan: RefreshPlan) -> str:
    """What `read_plan` reads."""
    return "; ".join(f"{'x'.join(map(str, dims))} {choice}" for dims, choice in plan.items())


@functools.lru_cache(maxsize=64)
def read_plan(text: str) -> RefreshPlan:
    """The plan of a text for which `is_plan_text` holds; empty for one that is yet to be made."""
    if text in ("", MEASURING):
        return {}
    found = {}
    for entry in text.split("; "):
        match = _ENTRY.fullmatch(entry)
        if match is None:
            raise ValueError(f"no refresh plan: {entry!r}")
        dims, on, method, period = match.groups()
        every = None if period is None else int(period)
        choice = Choice(cast("Place", on), cast("Literal['qr', 'ldlr']", method), every)
        found[tuple(map(int, dims.split("x")))] = choice
    return found


def is_plan_text(value: object) -> bool:
    """Whether `read_plan` can read it."""
    if not isinstance(value, str) or len(value) > _LONGEST:
        return False
    try:
        plan = read_plan(value)
    except ValueError:
        return False
    return all(choice.period is None or choice.period >= 1 for choice in plan.values())
