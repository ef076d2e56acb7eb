"""A progress bar where tqdm is installed, else nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

try:
    from tqdm import tqdm  # type: ignore[import-untyped]
except ImportError:  # it is optional
    tqdm = None

__all__ = ["in_progress"]

T = TypeVar("T")


def in_progress(steps: Iterable[tuple[str, T]]) -> Iterator[tuple[str, T]]:
    """The (name, step) pairs; a bar on stderr, if that is a terminal, says which one goes on."""
    known = list(steps)
    if tqdm is None:
        yield from known
        return
    with tqdm(known, disable=None, leave=False) as bar:
        for name, step in bar:
            bar.set_description(name)
            yield name, step
