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
from asteria.linalg.deferred import Program, do, run
from asteria.linalg.modes import transform
from asteria.linalg.scratch import Scratch
from asteria.runtime.chunks import Chunk, Update
from asteria.runtime.guard import gate_on
from asteria.runtime.ledger import Ledger
from asteria.runtime.narrow import widened
from asteria.runtime.passages import Passage, may_be_put_off
from asteria.runtime.records import ParameterRecord
from asteria.runtime.rows import parts_of, state_of
from asteria.runtime.weights import Descent, apply_, gather, gradients_of, normalize_
from asteria.store.layout import FieldSpec, Layout, Life
from asteria.telemetry.phases import phase

__all__ = ["Updater", "moves", "moves_at_once", "scale_of"]


class Updater:
    """Updates chunks whose fields are acquired. For the training thread."""

    def __init__(self, start: str) -> None:
        """``start`` as in RuntimeConfig."""
        self._start = start
        self._scratch = Scratch()
        self._due: list[Passage] = []

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

    def defer(self, chunk: Chunk, updates: Mapping[ParameterRecord, Update]) -> bool:
        """Write down what `update_` does without a gate, for `run`; whether that can be done."""
        asked = [updates[tile.record] for tile in chunk.tiles]
        if asked.count(asked[0]) < len(asked):
            return False
        notes, place = chunk.extent.notes, (chunk.start, chunk.stop)
        passage = notes.get(place)
        if not (isinstance(passage, Passage) and passage.fits(chunk, self._scratch.replaced)):
            if not may_be_put_off(chunk):
                return False
            passage = self._write_down(chunk)
            if len(chunk.tiles) > 1:  # a lone gradient may be used as it is
                notes[place] = passage
        passage.renew(chunk, asked[0])
        self._due.append(passage)
        return True

    def _write_down(self, chunk: Chunk) -> Passage:
        """`update_` of the chunk, as far as it is the same at every step."""
        program, gradients = Program(), gradients_of(chunk)
        weights = [tile.record.parameter for tile in chunk.tiles]
        with program:
            gradient = gather(chunk, self._scratch, None, gradients)
            state, pair = self._state(chunk, chunk.extent.cells), self._pair(chunk)
            direction, _ = chunk.extent.rule.direction_(
                state, gradient, chunk.hyper, step=chunk.steps + 1, scratch=pair, gate=None
            )
            changes = self._scratch.cut(direction, [weight.shape for weight in weights])
            descent = Descent(weights, changes)
            do(descent.take)
            _accumulate_(_Work(chunk, state, gradient, pair, None), first=True, noted=None)
        return Passage(chunk.hyper, self._scratch.replaced, descent, gradients, program)

    def run(self) -> None:
        """Do what was written down; before anything else is done with the same state or scratch."""
        due, self._due = self._due, []
        try:
            run([passage.program for passage in due])
        finally:
            for passage in due:
                passage.end()

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
