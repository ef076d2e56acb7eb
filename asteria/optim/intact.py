"""Whether an optimizer has its state: it has not when a load came to an end in the middle."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from asteria.errors import CheckpointError

__all__ = ["Intact"]


class Intact:
    """Remembers a state that was given up for another one, which then could not be had.

    There is rarely room for both. To go on without either would begin afresh in silence. For the
    training thread.
    """

    def __init__(self) -> None:
        self._lost_by: BaseException | None = None

    @contextmanager
    def replacing(self) -> Iterator[None]:
        """The old state is gone; the new one is there where this ends without an error."""
        try:
            yield
        except BaseException as error:
            self._lost_by = error.with_traceback(None)  # which would keep what was to be loaded
            raise
        self._lost_by = None

    def check(self) -> None:
        """Raise CheckpointError if there is no state because the latest load has failed."""
        if self._lost_by is not None:
            raise CheckpointError(
                "the latest load_state_dict failed after the old state had made room for the new "
                f"one ({type(self._lost_by).__name__}: {self._lost_by}): this optimizer has no "
                "state. Remove the cause and call load_state_dict again, or make a new optimizer"
            ) from self._lost_by
