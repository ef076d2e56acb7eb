"""The step: from gradients to weights, block by block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from asteria.algorithms.adam import largest_ratio
from asteria.algorithms.algorithm import Algorithm, BlockState, Pair
from asteria.config.runtime import RuntimeConfig
from asteria.linalg.eigenbasis import (
    BasisResult,
    eigh_basis,
    matched_eigh_basis,
    orthogonal_iteration,
)
from asteria.linalg.modes import replace_
from asteria.linalg.scratch import Scratch
from asteria.refresh.schedule import is_due, young_steps
from asteria.runtime.admission import admit, discard
from asteria.runtime.chunks import CHUNK_BYTES, Chunk, Update, chunks
from asteria.runtime.guard import DeviceGuard, finite_flags, nonfinite_error, surely_finite
from asteria.runtime.records import Extent, ExtentKey, ParameterRecord
from asteria.runtime.weights import apply_, gather, normalize_
from asteria.telemetry.counters import Stats

__all__ = ["Engine"]


class Engine:
    """State and step of one optimizer. Every method is for the training thread."""

    def __init__(self, config: RuntimeConfig) -> None:
        self._config = config
        self._extents: dict[ExtentKey, Extent] = {}
        self._scratch = Scratch()
        self._guard = DeviceGuard()
        self._steps = 0
        self._skipped_steps = 0
        self._refreshes = 0
        self._failures: dict[torch.device, Tensor] = {}

    def admit(
        self,
        records: list[ParameterRecord],
        saved: Mapping[ParameterRecord, Mapping[str, Tensor]] | None = None,
    ) -> None:
        """Make state for new records, from what was saved of them if anything was."""
        admit(records, saved or {}, self._extents)

    def discard(self, records: list[ParameterRecord]) -> None:
        """Drop the state of records."""
        discard(records, self._extents)

    def settle(self) -> None:
        """Wait for the device's word on every step, so that the counters are right.

        Raises NonFiniteGradientError if the configuration asks for it and a step was refused.
        """
        self._collect_verdicts(wait=True)

    def stats(self) -> Stats:
        """What was done so far; waits for the device."""
        self.settle()
        return Stats(
            steps=self._steps,
            skipped_steps=self._skipped_steps,
            refreshes=self._refreshes,
            failed_refreshes=sum(int(count) for count in self._failures.values()),
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
        self._steps += 1
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
        self._skipped_steps += len(steps)
        if steps and self._config.nonfinite == "raise":
            raise nonfinite_error(steps[0])

    def step(self, updates: Mapping[ParameterRecord, Update], gate: Tensor | None) -> None:
        """One step of every parameter in ``updates``, whose gradients are there and accepted."""
        for extent in self._extents.values():
            for chunk in chunks(extent, updates):
                self._step_chunk(chunk, updates, gate)
        moved = [r for r in updates if r.begun or self._moves_at_once(r.route.rule)]
        _count_updates(moved, 1)
        for record in updates:
            record.begun = True
        if gate is not None:
            self._guard.on_refusal(lambda: _count_updates(moved, -1))

    def _moves_at_once(self, rule: Algorithm) -> bool:
        """Whether the first gradient already advances the moments."""
        start = self._config.start
        return start == "adam" or (start == "fresh" and not rule.has_bases)

    def _step_chunk(
        self, chunk: Chunk, updates: Mapping[ParameterRecord, Update], gate: Tensor | None
    ) -> None:
        rule, stack, hyper = chunk.extent.rule, chunk.extent.stack, chunk.hyper
        state = chunk.state
        shape = (chunk.stop - chunk.start, *chunk.extent.shape.dims)
        first, second = (
            self._scratch.take(name, shape, stack.dtype, stack.device)
            for name in ("first", "second")
        )
        if gate is not None:
            gate = gate.to(device=stack.device, dtype=stack.dtype, non_blocking=True)
        gradient = gather(chunk, self._scratch, gate)

        moves = chunk.begun or self._moves_at_once(rule)
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

    def _begin_(self, chunk: Chunk, state: BlockState, gradient: Tensor) -> None:
        """First statistics and bases."""
        chunk.extent.rule.begin_(state, gradient, chunk.hyper)
        for mode in range(len(chunk.extent.shape.dims)):
            factor, basis = state.get(f"factor_{mode}"), state.get(f"basis_{mode}")
            if factor is None or basis is None:
                continue
            if self._config.start == "adam":
                basis.copy_(torch.eye(basis.shape[-1], dtype=basis.dtype, device=basis.device))
                continue
            for blocks in _parts(state):
                fresh = eigh_basis(factor[blocks])
                self._count_refresh(fresh)
                basis[blocks].copy_(fresh.basis)

    def _refresh_due(
        self, chunk: Chunk, state: BlockState, scratch: Pair, gate: Tensor | None
    ) -> None:
        """Refresh every basis of the chunk if its step says so, and carry the moments along."""
        rule, hyper, step = chunk.extent.rule, chunk.hyper, chunk.steps + 1
        start = self._config.start
        period = hyper.precondition_frequency
        young_until = young_steps(hyper.shampoo_beta) if start == "fresh" else 0
        if not rule.has_bases or not is_due(step, period=period, young_until=young_until):
            return
        exact = self._config.refresh_method == "eigh" or (start == "adam" and step == period)
        modes = range(len(chunk.extent.shape.dims))
        for blocks in _parts(state):
            part = {name: tensor[blocks] for name, tensor in state.items()}
            fresh: list[Tensor | None] = [None for _ in modes]
            for mode in modes:
                factor, basis = part.get(f"factor_{mode}"), part.get(f"basis_{mode}")
                if factor is not None and basis is not None:
                    fresh[mode] = self._refreshed(
                        factor, basis, exact=exact, sort=rule.sorts_columns
                    )
            rule.rotate_(
                part,
                fresh,
                scratch=(scratch[0][blocks], scratch[1][blocks]),
                gate=gate,
                # The published code lets the ratio of the moments grow without bound.
                bound=None if start == "eigh" else largest_ratio(hyper),
            )
            for mode, basis in enumerate(fresh):
                if basis is not None:
                    replace_(part[f"basis_{mode}"], basis, gate)

    def _refreshed(self, factor: Tensor, basis: Tensor, *, exact: bool, sort: bool) -> Tensor:
        """New bases (b, n, n); where none could be computed, the ones in use."""
        if exact:
            result = matched_eigh_basis(factor, basis)
        else:
            result = orthogonal_iteration(factor, basis, sort=sort)
        self._count_refresh(result)
        if factor.device.type == "cpu" and bool(result.usable.all()):
            return result.basis
        return torch.where(result.usable[:, None, None], result.basis, basis)

    def _count_refresh(self, result: BasisResult) -> None:
        device = result.usable.device
        self._refreshes += len(result.usable)
        failed = (~result.usable).sum()
        self._failures[device] = self._failures.get(device, torch.zeros_like(failed)) + failed


def _count_updates(records: list[ParameterRecord], change: int) -> None:
    for record in records:
        record.steps += change
    if records:
        torch._foreach_add_([record.entries["step"] for record in records], change)


def _parts(state: BlockState) -> Iterator[slice]:
    """Cuts the blocks so that what is made of their largest factors stays within a chunk."""
    factors = [tensor for name, tensor in state.items() if name.startswith("factor_")]
    if factors:
        largest = max(factor[0].numel() * factor.element_size() for factor in factors)
        step = max(1, CHUNK_BYTES // largest)
        for start in range(0, len(factors[0]), step):
            yield slice(start, start + step)
