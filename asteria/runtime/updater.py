"""The mathematics of a step for one chunk: moments, weights, and what is added to the factors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from asteria.algorithms.adam import largest_ratio
from asteria.algorithms.algorithm import (
    Algorithm,
    BlockState,
    Contribution,
    Pair,
    bases,
    fold_,
)
from asteria.config.hyperparameters import Hyperparameters
from asteria.linalg.deferred import Program
from asteria.linalg.modes import transform
from asteria.linalg.scratch import Scratch
from asteria.runtime.chunks import Chunk, Update
from asteria.runtime.guard import gate_on
from asteria.runtime.ledger import Ledger
from asteria.runtime.narrow import widened
from asteria.runtime.passages import Passage, is_plain
from asteria.runtime.records import ParameterRecord
from asteria.runtime.rows import parts_of, state_of
from asteria.runtime.weights import apply_, gather, normalize_
from asteria.store.layout import FieldSpec, Layout, Life
from asteria.telemetry.phases import phase

__all__ = ["Updater", "moves", "moves_at_once", "scale_of"]


class Updater:
    """Updates chunks whose fields are acquired. For the training thread."""

    def __init__(self, start: str) -> None:
        """``start`` as in RuntimeConfig."""
        self._start = start
        self._scratch = Scratch()
        self._program = Program()

    def pair(self, chunk: Chunk) -> Pair:
        """Scratch of the gradient's shape, or of that of its rows that are updated at a time."""
        return self._pair(parts_of(chunk)[0][0])

    def _pair(self, part: Chunk) -> Pair:
        extent, shape = part.extent, (part.stop - part.start, *part.shape.dims)
        first = self._scratch.take("first", shape, extent.dtype, extent.device)
        return first, self._scratch.take("second", shape, extent.dtype, extent.device)

    def _state(self, chunk: Chunk, lives: Iterable[Life]) -> BlockState:
        state = chunk.state(lives)
        if chunk.extent.rule.bases_in is None:
            return state
        return widened(state, chunk.extent.dtype, self._scratch)

    def begin_(self, chunk: Chunk, lives: Sequence[Life], gate: Tensor | None) -> None:
        """First statistics, from the first gradient."""
        state = self._state(chunk, lives)
        gate = gate_on(gate, chunk.extent.device, chunk.extent.dtype)
        for number, (part, rows) in enumerate(parts_of(chunk)):
            own = state_of(state, rows, chunk.shape)
            gradient = gather(part, self._scratch, gate)
            rule, beta = chunk.extent.rule, chunk.hyper.shampoo_beta if number == 0 else 1.0
            for contribution in _kept(part, rule.first_contributions(own, gradient, chunk.hyper)):
                fold_(own, contribution, beta, None)

    def project_(self, chunk: Chunk, lives: Sequence[Life]) -> None:
        """Carry moments that were loaded without bases into the first ones."""
        state, bound = self._state(chunk, lives), largest_ratio(chunk.hyper)
        for part, rows in parts_of(chunk):
            own = state_of(state, rows, chunk.shape)
            chunk.extent.rule.project_moments_(own, scratch=self._pair(part), bound=bound)

    def open(self, chunk: Chunk, ledger: Ledger) -> None:
        """Make room for what the step is going to add to factors that it has not acquired."""
        key = chunk.extent.key
        start, stop = chunk.extent.place(chunk.start, chunk.stop, Life.SUM)
        if start == stop:
            return
        layout = Layout([FieldSpec("x", key.shape.dims)], stop - start, key.dtype)
        tensors = key.rule.contributed_tensors(key.shape)
        ledger.open(layout, tensors, chunk.extent.cells[Life.SUM].home)

    def can_defer(self, chunk: Chunk, gate: Tensor | None) -> bool:
        """Whether `defer` would do what `update_` does, its state being at home."""
        extent, hyper = chunk.extent, chunk.hyper
        return (
            gate is None
            and chunk.begun
            and extent.resident
            and extent.keeps_all
            and extent.device.type == "cpu"
            and extent.rule.can_defer
            and len(chunk.shape.dims) in (0, 2)
            and not (hyper.maximize or hyper.normalize_grads)
            and not torch._C._autograd._profiler_enabled()  # which shows what belongs where
        )

    def defer(self, chunk: Chunk, updates: Mapping[ParameterRecord, Update]) -> None:
        """Write down what `update_` does, for `run`."""
        first, *others = [updates[tile.record] for tile in chunk.tiles]
        passage = self._passage(chunk) if others.count(first) == len(others) else None
        with self._program:
            if passage is not None:
                passage.ask(chunk, first)
            else:
                self.update_(chunk, list(chunk.extent.cells), updates, None)

    def _passage(self, chunk: Chunk) -> Passage | None:
        """The chunk's, which is kept from step to step beside the views of its state."""
        notes, place = chunk.extent.notes, (chunk.start, chunk.stop)
        known = notes.get(place)
        if isinstance(known, Passage) and known.fits(chunk, self._scratch.replaced):
            return known
        made = self._write_down(chunk) if is_plain(chunk) else None
        if made is not None:
            notes[place] = made
        return made

    def _write_down(self, chunk: Chunk) -> Passage | None:
        """`update_`, but for the gradients and rates, which are others at every step."""
        extent, state, pair = chunk.extent, chunk.state(), self._pair(chunk)
        shape = (chunk.stop - chunk.start, *chunk.shape.dims)
        gradient = self._scratch.take("gradient", shape, extent.dtype, extent.device)
        work, before, after = _Work(chunk, state, gradient, pair, None), Program(), Program()
        with before:
            direction, _ = self._direction_(work)
        if direction is None:
            return None
        with after:
            _accumulate_(work, first=True, noted=None)
        weights = [tile.record.parameter for tile in chunk.tiles]
        shapes, memory = [weight.shape for weight in weights], self._scratch.replaced
        gathered, changes = (self._scratch.cut(stack, shapes) for stack in (gradient, direction))
        return Passage(chunk.hyper, memory, gathered, before, weights, changes, after)

    def run(self) -> None:
        """Do what was written down; before anything else is done with the same state or scratch."""
        self._program.run()

    @phase("update")
    def update_(
        self,
        chunk: Chunk,
        lives: Sequence[Life],
        updates: Mapping[ParameterRecord, Update],
        gate: Tensor | None,
    ) -> Iterable[Life]:
        """Moments, weights and factors; returns what has changed."""
        state, parts = self._state(chunk, lives), parts_of(chunk)
        gate = gate_on(gate, chunk.extent.device, chunk.extent.dtype)
        noted = chunk.extent.ledger if chunk.begun and Life.SUM not in lives else None
        in_bases = chunk.extent.rule.in_bases and moves(self._start, chunk)
        for part, rows in parts:
            gradient, own = gather(part, self._scratch, gate), state_of(state, rows, chunk.shape)
            first, work = part is parts[0][0], _Work(part, own, gradient, self._pair(part), gate)
            if in_bases:
                # Factors want the projection, which the moments then take the place of.
                basis = bases(own, gradient.dim() - 1)
                projected = transform(gradient, basis, work.pair, transpose=True)
                work = work._replace(gradient=projected)
                if chunk.begun:
                    _accumulate_(work, first=first, noted=noted)
            direction, scale = self._direction_(work)
            if direction is None:
                continue
            if chunk.hyper.normalize_grads:
                normalize_(direction, part)
            apply_(direction, part, updates, self._scratch, scale=scale, gate=gate)
            if chunk.begun and not in_bases:
                _accumulate_(work, first=first, noted=noted)
        if not chunk.begun:
            return Life
        return (Life.STEP,) if noted is not None else (Life.STEP, Life.SUM)

    def _direction_(self, work: _Work) -> tuple[Tensor | None, float]:
        """The update and a factor on the learning rate; None where there is none yet."""
        chunk, state, gradient, pair, gate = work
        rule, hyper = chunk.extent.rule, chunk.hyper
        if moves(self._start, chunk):
            step = chunk.steps + 1
            return rule.direction_(state, gradient, hyper, step=step, scratch=pair, gate=gate)
        if self._start != "fresh":
            return None, 0.0
        # In the eigenbasis of this very gradient Adam would amplify what is rounding noise.
        torch.abs(gradient, out=pair[0]).add_(hyper.eps)
        return torch.div(gradient, pair[0], out=pair[1]), 1.0


class _Work(NamedTuple):
    """What an update of blocks needs."""

    chunk: Chunk
    state: BlockState
    gradient: Tensor
    pair: Pair
    gate: Tensor | None


def _accumulate_(work: _Work, *, first: bool, noted: Ledger | None) -> None:
    """Add to the factors, which the ``first`` part decays, or note what is to be added."""
    chunk, state, gradient, pair, gate = work
    extent, beta = chunk.extent, chunk.hyper.shampoo_beta
    given = extent.rule.contributions(state, gradient, chunk.hyper, scratch=pair, gate=gate)
    if noted is not None and chunk.kept:
        place = extent.place(chunk.start, chunk.stop, Life.SUM)
        noted.note(_kept(chunk, given), place, beta=beta, gate=gate)
        return
    if not extent.keeps_all:
        given = _kept(chunk, given)
    for contribution in given:
        fold_(state, contribution, beta if first else 1.0, gate)


def _kept(chunk: Chunk, given: Iterable[Contribution]) -> Iterator[Contribution]:
    """What is given to the factors that are kept here; all of it is made, as every rank makes it.

    They take it together, be there gaps between their blocks.
    """
    runs, blocks = chunk.kept, chunk.stop - chunk.start
    x: Tensor | None = None
    for contribution in given:
        if not runs:
            continue
        if runs == [slice(0, blocks)]:
            yield contribution
            continue
        if x is None or not contribution.again:
            parts = [contribution.x[run] for run in runs]
            x = parts[0] if len(parts) == 1 else torch.cat(parts)
        yield contribution._replace(x=x)


def moves(start: str, chunk: Chunk) -> bool:
    """Whether a step advances the chunk's moments."""
    return chunk.has_moments or moves_at_once(start, chunk.extent.rule)


def scale_of(start: str, record: ParameterRecord, hyper: Hyperparameters) -> float | None:
    """The factor on the learning rate in the record's next step, which may be another rank's.

    None if that one changes no weight.
    """
    rule = record.route.rule
    if record.has_moments or moves_at_once(start, rule):
        return rule.scale(hyper, record.steps + 1)
    return 1.0 if start == "fresh" else None


def moves_at_once(start: str, rule: Algorithm) -> bool:
    """Whether the first gradient already advances the moments."""
    return start == "adam" or (start == "fresh" and not rule.has_bases)
