"""Refreshes inside the step: by this process, or shared with other ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from asteria.algorithms.algorithm import Pair
from asteria.config.runtime import RuntimeConfig
from asteria.linalg.method import Method
from asteria.runtime.chunks import Chunk
from asteria.runtime.inline import InlineRefresher
from asteria.runtime.records import ParameterRecord
from asteria.runtime.results import Exchange
from asteria.runtime.shared_refresh import SharedRefresher
from asteria.runtime.units import Units
from asteria.runtime.verdicts import Verdicts
from asteria.store.layout import Life
from asteria.telemetry.counters import Counters

__all__ = ["InsideRefresher"]


class InsideRefresher:
    """What a step computes itself of the bases of its chunks. For the training thread."""

    def __init__(
        self,
        config: RuntimeConfig,
        counters: Counters,
        units: Units,
        verdicts: Verdicts,
        exchange: Exchange,
    ) -> None:
        self._exchange = exchange
        self._inline = InlineRefresher(config, counters, units, verdicts)
        self._shared = SharedRefresher(config, counters, units, exchange)

    def begin_(self, chunk: Chunk, lives: Sequence[Life], scratch: Callable[[Chunk], Pair]) -> None:
        """First bases, of the first factors; waits for the device.

        Where others have their part they come with `finish`, unless there are moments that need
        them at once.
        """
        if not self._exchange.shares(chunk.tiles[0].record):
            self._inline.begin_(chunk, chunk.state(lives))
            return
        self._shared.begin(chunk)
        if chunk.has_moments:
            self._shared.finish(scratch)

    def refresh_(
        self,
        chunk: Chunk,
        scratch: Callable[[Chunk], Pair],
        gate: Tensor | None,
        *,
        method: Method,
        bound: float | None,
    ) -> None:
        """Refresh every basis of the chunk; where others have their part they come with `finish`.

        ``bound`` as in `Algorithm.rotate_`.
        """
        if self._exchange.shares(chunk.tiles[0].record):
            self._shared.refresh(chunk, gate, method=method, bound=bound)
        else:
            pair = scratch(chunk)
            self._inline.refresh_(chunk, chunk.state(), pair, gate, method=method, bound=bound)

    def finish(self, scratch: Callable[[Chunk], Pair]) -> None:
        """Install what was computed with other ranks; see `SharedRefresher.finish`."""
        self._shared.finish(scratch)

    def forget(self, records: set[ParameterRecord]) -> None:
        """These have no state any more."""
        self._shared.forget(records)
