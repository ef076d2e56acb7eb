"""What all ranks do, or none: a load that fails on one of them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import TypeAlias

from asteria.errors import CheckpointError, CoherenceError

__all__ = ["Consent", "Vote", "unanimously"]

Vote: TypeAlias = Callable[[bool], list[int]]
"""Tells all other ranks whether this one has failed, and returns the ranks that have."""

_CONSEQUENCES = (
    "nothing was loaded on any rank",
    "no rank has a state until another load succeeds on all of them",
)
"""Of a failure before a rank gives up its old state, and after that."""


class Consent:
    """A load as a context: nobody waits for a rank that has failed in it. Training thread only.

    Each rank tells twice how it went, before the old state is given up and when the new one is
    there. Whoever fails on the way tells it, too, and then has told enough.
    """

    def __init__(self, vote: Vote) -> None:
        """``vote`` raises CoherenceError where a rank does not tell."""
        self._vote = vote
        self._left = list(_CONSEQUENCES)

    def settle(self) -> None:
        """Return when all ranks have come as far as this one: checked, and then loaded.

        Raises CheckpointError where a rank has failed.
        """
        consequence = self._left.pop(0)
        failed = self._vote(False)
        if failed:
            self._left = []
            names = ", ".join(map(str, failed))
            raise CheckpointError(
                f"a state was to be loaded on all ranks, and rank {names} could not, and says why; "
                f"{consequence}"
            )

    def __enter__(self) -> Consent:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # After a CoherenceError there is nobody to be told.
        if isinstance(error, Exception) and not isinstance(error, CoherenceError):
            if self._left:
                with suppress(CoherenceError):  # what has failed here is what matters
                    self._vote(True)


def unanimously(check: Callable[[], None], vote: Vote, what: str) -> None:
    """Return if ``check`` raises nothing on any rank. Training thread only.

    Raises what it raises here, or CoherenceError that says ``what`` another rank could not do.
    """
    try:
        check()
    except Exception:
        with suppress(CoherenceError):  # what has failed here is what matters
            vote(True)
        raise
    if failed := vote(False):
        raise CoherenceError(
            f"rank {', '.join(map(str, failed))} could not {what}, and says why; nothing has "
            "changed on any rank. Once its cause is gone, call step() again on all of them"
        )
