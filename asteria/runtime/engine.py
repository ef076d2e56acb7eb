"""The step: from gradients to weights, block by block."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from asteria.algorithms.adam import largest_ratio
from asteria.algorithms.algorithm import Algorithm, BlockState, Pair
from asteria.config.hyperparameters import Hyperparameters
from asteria.config.runtime import RuntimeConfig
from asteria.linalg.scratch import Scratch
from asteria.refresh.pool import Executor, WorkerPool
from asteria.refresh.schedule import is_due, is_young_step, young_steps
from asteria.refresh.threads import free_cores
from asteria.runtime.admission import admit, discard
from asteria.runtime.background import BackgroundRefresher
from asteria.runtime.chunks import Chunk, Update, chunks
from asteria.runtime.governor import Governor
from asteria.runtime.guard import DeviceGuard, finite_flags, nonfinite_error, surely_finite
from asteria.runtime.inline import InlineRefresher
from asteria.runtime.records import Extent, ExtentKey, ParameterRecord
from asteria.runtime.summary import summarize
from asteria.runtime.units import Unit, Units
from asteria.runtime.weights import apply_, gather, normalize_
from asteria.telemetry.counters import Counters, Stats
from asteria.telemetry.trace import Trace

__all__ = ["Engine"]


class Engine:
    """State and step of one optimizer. Every method is for the training thread."""

    def __init__(
        self,
        config: RuntimeConfig,
        executor: Executor | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """``executor`` does asynchronous refreshes, by default worker threads; ``clock`` in s."""
        self._config = config
        self._clock = clock
        self._extents: dict[ExtentKey, Extent] = {}
        self._scratch = Scratch()
        self._guard = DeviceGuard()
        self._counters = Counters()
        self._round_s = 0.0
        self._trace = None if config.trace is None else Trace(config.trace)
        self._units = Units(self._counters, max_failures=config.max_failures)
        self._inline = InlineRefresher(config, self._counters, self._units)
        self._background: BackgroundRefresher | None = None
        jobs = 0
        # Without staleness the step would wait for every result at once.
        if config.refresh == "async" and config.staleness > 0:
            executor = executor or WorkerPool(config.workers or free_cores(_training_threads()))
            self._background = BackgroundRefresher(
                config, self._counters, self._units, executor, clock, self._trace
            )
            jobs = executor.size
        self._governor = Governor(config, self._units, jobs=jobs)

    def admit(
        self,
        records: list[ParameterRecord],
        saved: Mapping[ParameterRecord, Mapping[str, Tensor]] | None = None,
    ) -> None:
        """Make state for new records, from what was saved of them if anything was."""
        saved = saved or {}
        admit(records, saved, self._extents)
        self._units.admit(
            {tile.record for extent in self._extents.values() for tile in extent.tiles}
        )
        if self._background is not None:
            self._background.admit(records)
            for record, values in saved.items():
                self._background.restore(record, values)

    def discard(self, records: list[ParameterRecord]) -> None:
        """Drop the state of records."""
        if self._background is not None:
            self._background.forget(records)
        self._governor.forget(records)
        self._units.discard(records)
        discard(records, self._extents)

    def shadows(self, record: ParameterRecord) -> dict[str, Tensor]:
        """What is in flight for a record, as state tensors; waits for the workers."""
        return {} if self._background is None else self._background.shadows(record)

    def close(self) -> None:
        """Stop the worker threads, which a later step starts again, and complete the trace."""
        if self._background is not None:
            self._background.pipeline.close()
        if self._trace is not None:
            self._trace.close()

    def begin_step(self, groups: list[dict[str, Any]]) -> None:
        """A step begins; decide what is left to us in ``groups``, which are changed in place."""
        self._governor.begin_step(groups, self._clock())

    def settle(self) -> None:
        """Wait for the device's word on every step, so that the counters are right.

        Raises NonFiniteGradientError if the configuration asks for it and a step was refused.
        """
        self._collect_verdicts(wait=True)

    def stats(self) -> Stats:
        """What was done so far; waits for the device."""
        self.settle()
        return summarize(
            self._counters, self._units, self._inline, self._background, self._governor
        )

    def accepts(
        self, names: list[str], gradients: list[Tensor], *, ready: bool
    ) -> tuple[bool, Tensor | None]:
        """Look at a step's gradients, before anything is changed: (whether to step, gate).

        On the host, or with ``ready`` False (state is yet to be made, which waits for the device
        anyway), a non-finite gradient is found now; else a gate comes back that closes on the
        device, and the report follows at a later step. Raises NonFiniteGradientError if the
        configuration asks for it.
        """
        self._counters.steps += 1
        self._collect_verdicts(wait=False)
        on_host = all(gradient.is_cpu for gradient in gradients)
        if on_host and surely_finite(gradients):
            return True, None
        if ready and not on_host:
            return True, self._guard.gate(gradients, names)
        names, flags = finite_flags(names, gradients)
        bad = [name for name, ok in zip(names, flags.tolist(), strict=True) if not ok]
        if bad:
            self._count_skips([bad])
        return not bad, None

    def _collect_verdicts(self, *, wait: bool) -> None:
        self._count_skips(self._guard.collect(wait=wait))

    def _count_skips(self, steps: list[list[str]]) -> None:
        """Count skipped steps, given the names of their bad gradients; raise for the first."""
        self._counters.skipped_steps += len(steps)
        if steps and self._config.nonfinite == "raise":
            raise nonfinite_error(steps[0])

    def step(self, updates: Mapping[ParameterRecord, Update], gate: Tensor | None) -> None:
        """One step of every parameter in ``updates``, whose gradients are there and accepted.

        Raises RefreshError, or what a worker raised, before anything is changed.
        """
        start = self._clock()
        self._units.report()
        if self._background is not None:
            self._background.collect(updates, self._governor)
        begin, installs = self._clock(), self._counters.installs
        self._units.begin_step()  # installs are never taken back
        work = [chunk for extent in self._extents.values() for chunk in chunks(extent, updates)]
        if self._background is not None and self._background.has_landings:
            for chunk in work:
                bound = _bound(self._config.start, chunk.hyper)
                self._background.install_(chunk, chunk.state, self._pair(chunk), bound=bound)
        installed, installs = self._clock(), self._counters.installs - installs
        self._counters.install_s += installed - begin
        undos = [self._units.begin_step()]
        if self._background is not None:
            undos.append(self._background.begin_step())
        before_s, self._round_s = self._counters.refresh_s, 0.0
        for chunk in work:
            self._step_chunk(chunk, updates, gate)
        moved = [r for r in updates if r.begun or _moves_at_once(self._config.start, r.route.rule)]
        _count_updates(moved, 1)
        for record in updates:
            record.begun = True
        if gate is not None:

            def undo() -> None:
                _count_updates(moved, -1)
                for undo_part in undos:
                    undo_part()

            self._guard.on_refusal(undo)
        refresh_s = self._counters.refresh_s - before_s
        if self._round_s:
            self._governor.pace.refreshed_inside(self._round_s)
        end = self._clock()
        self._counters.update_s += end - installed - refresh_s
        if self._trace is not None:
            self._draw("step", f"step {self._counters.steps}", start, end)
            if installs:
                self._draw("installs", "install", begin, installed)

    def _draw(self, lane: str, name: str, start_s: float, end_s: float) -> None:
        if self._trace is not None:
            self._trace.span(lane, name, int(start_s * 1e9), int(end_s * 1e9))

    def _step_chunk(
        self, chunk: Chunk, updates: Mapping[ParameterRecord, Update], gate: Tensor | None
    ) -> None:
        rule, stack, hyper = chunk.extent.rule, chunk.extent.stack, chunk.hyper
        state, (first, second) = chunk.state, self._pair(chunk)
        if gate is not None:
            gate = gate.to(device=stack.device, dtype=stack.dtype, non_blocking=True)
        gradient = gather(chunk, self._scratch, gate)

        moves = chunk.begun or _moves_at_once(self._config.start, rule)
        if not chunk.begun:
            self._begin_(chunk, state, gradient)
        if moves:
            direction, scale = rule.direction_(
                state, gradient, hyper, step=chunk.steps + 1, scratch=(first, second), gate=gate
            )
        elif self._config.start == "fresh":
            # In the eigenbasis of this very gradient Adam would amplify what is rounding noise.
            torch.abs(gradient, out=first).add_(hyper.eps)
            direction, scale = torch.div(gradient, first, out=second), 1.0
        else:
            return
        if hyper.normalize_grads:
            normalize_(direction, chunk)
        apply_(direction, chunk, updates, scale=scale, gate=gate)
        if chunk.begun:
            rule.accumulate_(state, gradient, hyper, scratch=(first, second), gate=gate)
        if moves:
            self._refresh_due(chunk, state, (first, second), gate)

    def _pair(self, chunk: Chunk) -> Pair:
        """Scratch of the gradient's shape."""
        stack, shape = chunk.extent.stack, (chunk.stop - chunk.start, *chunk.extent.shape.dims)
        first = self._scratch.take("first", shape, stack.dtype, stack.device)
        return first, self._scratch.take("second", shape, stack.dtype, stack.device)

    def _begin_(self, chunk: Chunk, state: BlockState, gradient: Tensor) -> None:
        """First statistics and bases."""
        chunk.extent.rule.begin_(state, gradient, chunk.hyper)
        start = self._clock()
        self._inline.begin_(chunk, state)
        end = self._clock()
        self._counters.refresh_s += end - start
        self._governor.pace.made_bases(end - start)
        self._draw("step", "first bases", start, end)

    def _refresh_due(
        self, chunk: Chunk, state: BlockState, scratch: Pair, gate: Tensor | None
    ) -> None:
        """Refresh or launch, after the update, what its step says."""
        rule, hyper, step = chunk.extent.rule, chunk.hyper, chunk.steps + 1
        if not rule.has_bases:
            return
        young = self._config.start == "fresh" and step < young_steps(hyper.shampoo_beta)
        at_once = young and is_young_step(step, hyper.young_stride)
        if at_once:
            self._counters.young_steps.add(self._counters.steps)
        if self._background is None:
            latest = min(
                self._units.latest(Unit(tile.record, tile.plan.ordinal)) for tile in chunk.tiles
            )
            period = hyper.precondition_frequency
            at_once = at_once or is_due(step, period=period, version=latest)
        if at_once:
            start = self._clock()
            first = all(t.record.versions[t.plan.ordinal] == 0 for t in chunk.tiles)
            exact = self._config.refresh_method == "eigh" or (
                self._config.start == "adam" and first
            )
            bound = _bound(self._config.start, hyper)
            self._inline.refresh_(chunk, state, scratch, gate, exact=exact, bound=bound)
            end = self._clock()
            self._counters.refresh_s += end - start
            self._round_s += end - start
            self._draw("step", "refresh inside the step", start, end)
        if self._background is not None:
            if at_once:
                self._background.forget_older(chunk)
            else:
                # Where early rounds are too dear to take place, early waits are as well.
                prompt = young and hyper.young_stride == 1
                self._background.launch_due(chunk, state, prompt=prompt)


def _moves_at_once(start: str, rule: Algorithm) -> bool:
    """Whether the first gradient already advances the moments."""
    return start == "adam" or (start == "fresh" and not rule.has_bases)


def _bound(start: str, hyper: Hyperparameters) -> float | None:
    """Of the ratio of the moments; the published code lets it grow without bound."""
    return None if start == "eigh" else largest_ratio(hyper)


def _count_updates(records: list[ParameterRecord], change: int) -> None:
    for record in records:
        record.steps += change
    if records:
        torch._foreach_add_([record.entries["step"] for record in records], change)


def _training_threads() -> int:
    """Cores that training keeps busy; on an accelerator it is one thread that launches kernels."""
    return 2 if torch.accelerator.is_available() else torch.get_num_threads()
