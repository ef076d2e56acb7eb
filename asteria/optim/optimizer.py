"""The torch.optim.Optimizer contract, once for all of our optimizers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias, TypeVar, overload

import torch
from torch import Tensor

from asteria.algorithms.algorithm import Algorithm
from asteria.checkpoint.form import check_form
from asteria.checkpoint.manifest import KEY, manifest
from asteria.config.hyperparameters import DECIDED, Hyperparameters, check_group, check_keys
from asteria.config.runtime import RuntimeConfig
from asteria.errors import ConfigError
from asteria.optim.checks import (
    check_gradient,
    check_parameter,
    checked_runtime,
    given_parameters,
)
from asteria.optim.description import Description, describe
from asteria.optim.intact import Intact
from asteria.optim.loading import Named, loaded_groups, match_state
from asteria.optim.members import members
from asteria.optim.recording import make_record, way_of
from asteria.runtime.chunks import Update
from asteria.runtime.engine import Engine
from asteria.runtime.entries import Entries
from asteria.runtime.narrow import rule_for
from asteria.runtime.records import ParameterRecord
from asteria.runtime.routing import check_route, routing_options
from asteria.runtime.sharded import Together
from asteria.runtime.sharded_state import stepped_state
from asteria.telemetry.counters import Stats

__all__ = ["Parameters", "SecondOrderOptimizer"]

Parameters: TypeAlias = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]
Self = TypeVar("Self", bound="SecondOrderOptimizer")


class SecondOrderOptimizer(torch.optim.Optimizer):
    """Base of SOAP, KLShampoo and KLSOAP: they differ in ``rule`` and in their options.

    State of a parameter, ``optimizer.state[p]``: flat tensors, float32 (float64 for float64
    parameters) on the parameter's device; ``step`` is a float32 scalar on the host. Everything
    here is for the training thread.
    """

    rule: Algorithm

    def __init__(
        self, params: Parameters, defaults: dict[str, Any], runtime: RuntimeConfig | None
    ) -> None:
        runtime = checked_runtime(runtime)
        check_group(defaults, type(self).__name__)
        given = given_parameters(type(self).__name__, params)
        self._runtime = runtime
        self.rule = rule_for(type(self).rule, runtime)
        self._engine, self._intact = Engine(runtime), Intact()
        self._records: dict[Tensor, ParameterRecord] = {}
        # The published code knows no stacks of matrices, so the control arm guesses none.
        control = replace(runtime, nonfinite="raise") == RuntimeConfig.reference()
        batch_dims = 0 if control else None
        ours = {"batch_dims": batch_dims, **DECIDED, KEY: manifest(self.rule)}
        super().__init__(given, {**defaults, **ours})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, with options of their own; raises ConfigError for what cannot be used."""
        if not isinstance(param_group, dict):
            raise ConfigError(f"param_group must be a dict, found {type(param_group).__name__}")
        where = f"group {len(self.param_groups)}"
        check_keys(param_group, self.defaults, where)
        check_group(param_group, where)
        given = param_group.get("params")
        if isinstance(given, Iterable) and not isinstance(given, set):
            entries = [given] if isinstance(given, Tensor) else list(given)
            for position, entry in enumerate(entries):
                nameless = (f"parameter {position} of {where}", entry)
                name, p = entry if isinstance(entry, tuple) else nameless
                if isinstance(p, Tensor):
                    check_parameter(name, p)
                    options = {**self.defaults, **param_group}
                    way_of(name, p, options, self.rule, self._runtime.shards)
            param_group["params"] = entries
        param_group[KEY] = manifest(self.rule)
        super().add_param_group(param_group)  # which refuses what is no leaf tensor

    def _named(self) -> Iterator[Named]:
        """(index, name, parameter, group) of all parameters, in order."""
        index = 0
        for number, group in enumerate(self.param_groups):
            names = group.get("param_names")
            for position, parameter in enumerate(group["params"]):
                name = names[position] if names else f"parameter {position} of group {number}"
                yield index, name, parameter, group
                index += 1

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update all parameters that have a gradient.

        Waits for the device where first eigenbases are computed only. Raises GradientError (a
        sparse or non-finite gradient), ParameterChangedError, ConfigError, RefreshError or what a
        worker raised; weights and state are then as they were.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        present = [entry for entry in self._named() if entry[2].grad is not None]
        if present:
            self._step_parameters(present)
        return loss

    @torch._disable_dynamo  # type: ignore[attr-defined]  # lazily; torch.compiler imports it all
    def _step_parameters(self, present: list[Named]) -> None:
        self._intact.check()
        self._forget_replaced_state()
        self._engine.begin_step(self.param_groups)
        updates: dict[ParameterRecord, Update] = {}
        by_group: dict[int, tuple[Update, tuple[object, ...]]] = {}
        fresh: dict[Tensor, ParameterRecord] = {}
        for index, name, parameter, group in present:
            record = self._records.get(parameter) or fresh.get(parameter)
            if record is None:
                record = self._make_record(index, name, parameter, group)
                fresh[parameter] = record
            record.check_unchanged()
            check_gradient(name, parameter)
            if id(group) not in by_group:
                check_group(group, name, scheduled=True)
                hyper, lr = Hyperparameters.of(group), float(group["lr"])
                update = Update(hyper, lr, group["weight_decay"])
                by_group[id(group)] = update, routing_options(group)
            updates[record], options = by_group[id(group)]
            if options != record.options:
                check_route(name, record.options, options)
        steps, gate = self._accepts(
            list(updates), ready=not fresh and all(record.begun for record in updates)
        )
        if not steps:
            return
        if fresh:
            everyone = partial(members, self._named(), self.rule)
            self._engine.agree_on_room([*fresh.values()], self.param_groups, everyone)
            self._admit({r: stepped_state(r, self.state.get(p, {})) for p, r in fresh.items()})
        self._engine.step(updates, gate)

    def _accepts(
        self, records: list[ParameterRecord], *, ready: bool
    ) -> tuple[bool, Tensor | None]:
        parameters = sum(len(group["params"]) for group in self.param_groups)
        together = Together.of(records, parameters)
        gradients = [g for record in records if (g := record.seen_gradient) is not None]
        names, options = [r.name for r in records], {"together": together} if together else {}
        return self._engine.accepts(names, gradients, ready=ready, **options)

    def _forget_replaced_state(self) -> None:
        """Follow what was done to ``self.state`` from outside.

        A parameter whose state was removed begins afresh; one whose state, or a tensor of it, was
        replaced is admitted again with what is there now.
        """
        gone = [r for p, r in self._records.items() if not r.shows(self.state.get(p))]
        if gone:
            for record in gone:  # as long as it can be read
                if isinstance(entries := self.state.get(record.parameter), Entries):
                    self.state[record.parameter] = entries.promised()
            self._engine.discard(gone)
            for record in gone:
                del self._records[record.parameter]

    def _make_record(
        self, index: int, name: str, parameter: Tensor, group: Mapping[str, Any]
    ) -> ParameterRecord:
        return make_record((index, name, parameter, group), self.rule, self._runtime.shards)

    def _admit(self, saved: Mapping[ParameterRecord, Mapping[str, Tensor]]) -> None:
        """Make state for new records, of the saved values where there are any."""
        self._engine.admit(list(saved), saved, lambda: members(self._named(), self.rule))
        for record in saved:
            self._records[record.parameter] = record
            self.state[record.parameter] = record.facade or record.entries

    def describe(self) -> Description:
        """How every parameter is treated, as a table (``str``) or ``.rows``. Needs no gradient."""
        return describe(self._named(), self._records, self.rule, self._runtime)

    def stats(self) -> Stats:
        """What was done since this optimizer was made; waits for the device."""
        return self._engine.stats()

    def state_dict(self) -> dict[str, Any]:
        """State and groups in torch's format: flat tensors keyed by parameter, and plain values.

        What is packed or on a lower tier is as it is now, and read when somebody looks at it.
        Waits for the device and for refreshes in flight, which are part of it; all ranks call it if
        parameters are sharded. Raises NonFiniteGradientError if the device has refused a step,
        CheckpointError if the state got lost in a load.
        """
        self._settle()
        with ExitStack() as hooks:
            hooks.callback(self.register_state_dict_post_hook(_promise_all, prepend=True).remove)
            return super().state_dict()

    def _settle(self) -> None:
        self._intact.check()
        self._engine.settle()
        self._forget_replaced_state()

    def close(self) -> None:
        """Stop the worker threads, which a later step would start again; state on disk stays."""
        self._engine.close()

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` or `asteria.slim` gave; dtypes of the state stay as they are.

        Also takes the state of ``torch.optim.AdamW`` and, into SOAP, that of its authors' program:
        with the options that they have, and this optimizer's own for the others.
        Raises CheckpointError, which lists everything that does not fit, and then loads nothing.
        Whatever else is raised, as StoreFullError, comes when the old state has made room: then
        there is none until another load succeeds. All ranks call it; where one fails, all do.
        """
        records: dict[ParameterRecord, Mapping[str, Tensor]] = {}

        def take_state(_: torch.optim.Optimizer, loaded: dict[str, Any]) -> dict[str, Any]:
            # torch would cast every floating-point state tensor to its parameter's dtype.
            groups = loaded_groups(loaded, self.param_groups, self.defaults)
            named, make = self._named(), self._make_record
            records.update(match_state(loaded, groups, self.rule, self.defaults, named, make))
            self._engine.check_room(list(records))
            consent.settle()
            return {**loaded, "state": {}, "param_groups": groups}

        def put_state(_: torch.optim.Optimizer) -> None:
            self._restore(records)
            with self._intact.replacing():
                consent.settle()

        asked = self._engine.consent(self.param_groups, lambda: members(self._named(), self.rule))
        with asked as consent, ExitStack() as hooks:
            hooks.callback(self.register_load_state_dict_pre_hook(take_state).remove)
            hooks.callback(self.register_load_state_dict_post_hook(put_state, prepend=True).remove)
            super().load_state_dict(_as_dict(state_dict))

    def _restore(self, saved: Mapping[ParameterRecord, Mapping[str, Tensor]]) -> None:
        """Make ``saved`` the state of this optimizer, in memory of its own."""
        self._engine.discard(list(self._records.values()))
        self._records = {}
        with self._intact.replacing():
            self._admit(saved)

    def __getstate__(self) -> dict[str, Any]:
        """What pickling and copying keep: the state, and how the work is done."""
        self._settle()
        state = {p: _promised(entries) for p, entries in self.state.items()}
        return {**super().__getstate__(), "state": state, "_runtime": self._runtime}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take pickled state, or what torch's load_state_dict hands over."""
        super().__setstate__(state)
        # An option of torch's own optimizers, which loaded groups would then have and others not.
        self.defaults.pop("differentiable", None)
        if "_engine" not in self.__dict__:
            # Two optimizers cannot write one trace.
            self._runtime = replace(self._runtime, trace=None)
            self.rule = rule_for(type(self).rule, self._runtime)
            self._engine, self._intact = Engine(self._runtime), Intact()
            self._records = {}
            entries = self.state
            self._restore(
                {
                    (record := self._make_record(*named)): stepped_state(record, entries[named[2]])
                    for named in self._named()
                    if entries.get(named[2])
                }
            )


def _as_dict(given: object) -> dict[str, Any]:
    """What torch can copy; hooks may still bring it into form."""
    return given if isinstance(given, dict) else dict(check_form(given))


def _promise_all(_: torch.optim.Optimizer, packed: dict[str, Any]) -> None:
    packed["state"] = {key: _promised(entries) for key, entries in packed["state"].items()}


def _promised(entries: dict[str, Tensor]) -> dict[str, Tensor]:
    return entries.promised() if isinstance(entries, Entries) else {**entries}
