"""The torch.optim.Optimizer contract, once for all of our optimizers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeAlias, overload

import torch
from torch import Tensor

from asteria.algorithms.algorithm import Algorithm
from asteria.config.hyperparameters import Hyperparameters, check_group, check_keys
from asteria.config.runtime import RuntimeConfig
from asteria.errors import ConfigError
from asteria.optim.checks import check_dtype, check_gradient, check_parameter, group_problems
from asteria.optim.description import Description, describe_parameter
from asteria.optim.routing import route
from asteria.runtime.admission import check_saved
from asteria.runtime.chunks import Update
from asteria.runtime.engine import Engine
from asteria.runtime.records import ParameterRecord
from asteria.telemetry.counters import Stats

__all__ = ["Parameters", "SecondOrderOptimizer"]

Parameters: TypeAlias = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]


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
        runtime = RuntimeConfig() if runtime is None else runtime
        if not isinstance(runtime, RuntimeConfig):
            raise ConfigError(
                f"runtime must be an asteria.RuntimeConfig, found {type(runtime).__name__}"
            )
        check_group(defaults, type(self).__name__)
        given: Any = params if isinstance(params, Tensor | set) else list(params)
        if isinstance(given, list) and not given:
            raise ConfigError(
                f"{type(self).__name__} got an empty parameter list: pass model.parameters() of a "
                "model that has some, as a list if it is used twice"
            )
        self._runtime = runtime
        self._engine = Engine(runtime)
        self._records: dict[Tensor, ParameterRecord] = {}
        # The published code knows no stacks of matrices, so the control arm guesses none.
        control = replace(runtime, nonfinite="raise") == RuntimeConfig.reference()
        batch_dims = 0 if control else None
        super().__init__(given, {**defaults, "batch_dims": batch_dims})

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
                pair = (
                    entry
                    if isinstance(entry, tuple)
                    else (f"parameter {position} of {where}", entry)
                )
                if isinstance(pair[1], Tensor):
                    check_parameter(*pair)
                    route(pair[1].shape, {**self.defaults, **param_group}, self.rule, pair[0])
            param_group["params"] = entries
        super().add_param_group(param_group)  # which refuses what is no leaf tensor

    def _named(self) -> Iterator[tuple[int, str, Tensor, dict[str, Any]]]:
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

        Never waits for the device, but where the first eigenbases of a parameter are computed.
        Raises NonFiniteGradientError, GradientError (a sparse gradient) or ParameterChangedError;
        weights and state are then as they were.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        present = [entry for entry in self._named() if entry[2].grad is not None]
        if present:
            self._step_parameters(present)
        return loss

    def _step_parameters(self, present: list[tuple[int, str, Tensor, dict[str, Any]]]) -> None:
        self._forget_replaced_state()
        updates: dict[ParameterRecord, Update] = {}
        by_group: dict[int, Update] = {}
        fresh: dict[Tensor, ParameterRecord] = {}
        for index, name, parameter, group in present:
            record = self._records.get(parameter) or fresh.get(parameter)
            if record is None:
                record = self._make_record(index, name, parameter, group)
                fresh[parameter] = record
            record.check_unchanged()
            check_gradient(name, parameter)
            update = by_group.get(id(group))
            if update is None:
                check_group(group, name, scheduled=True)
                update = Update(
                    Hyperparameters.of(group), float(group["lr"]), group["weight_decay"]
                )
                by_group[id(group)] = update
            updates[record] = update
        steps, gate = self._engine.accepts(
            [record.name for record in updates],
            [gradient for record in updates if (gradient := record.parameter.grad) is not None],
            ready=not fresh,
        )
        if not steps:
            return
        if fresh:
            self._admit({record: self.state.get(p, {}) for p, record in fresh.items()})
        self._engine.step(updates, gate)

    def _forget_replaced_state(self) -> None:
        """Follow what was done to ``self.state`` from outside.

        A parameter whose state was removed begins afresh; one whose state, or a tensor of it, was
        replaced is admitted again with what is there now.
        """
        gone = [r for p, r in self._records.items() if not r.shows(self.state.get(p))]
        if gone:
            self._engine.discard(gone)
            for record in gone:
                del self._records[record.parameter]

    def _make_record(
        self, index: int, name: str, parameter: Tensor, group: Mapping[str, Any]
    ) -> ParameterRecord:
        check_dtype(name, parameter)
        return ParameterRecord(
            parameter=parameter,
            name=name,
            index=index,
            route=route(parameter.shape, group, self.rule, name),
            shape=parameter.shape,
            dtype=parameter.dtype,
            device=parameter.device,
        )

    def _admit(self, saved: Mapping[ParameterRecord, Mapping[str, Tensor]]) -> None:
        """Make state for new records, of the saved values where there are any."""
        self._engine.admit(list(saved), {r: values for r, values in saved.items() if values})
        for record in saved:
            self._records[record.parameter] = record
            self.state[record.parameter] = record.entries

    def describe(self) -> Description:
        """How every parameter is treated: rule, blocks, factors, bytes of state.

        A table under ``str()``, typed rows under ``.rows``. Needs no gradient.
        """
        rows = []
        for _, name, parameter, group in self._named():
            record = self._records.get(parameter)
            way = record.route if record else route(parameter.shape, group, self.rule, name)
            rows.append(describe_parameter(name, parameter, way))
        return Description(tuple(rows))

    def stats(self) -> Stats:
        """Counters since this optimizer was made; waits for the device."""
        return self._engine.stats()

    def state_dict(self) -> dict[str, Any]:
        """State and groups in torch's format: flat tensors keyed by parameter, and plain values.

        Waits for the device. Raises NonFiniteGradientError if it has refused a step.
        """
        self._engine.settle()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave; dtypes of the state stay as they are.

        Raises CheckpointError, which lists every key that does not fit, and then loads nothing;
        ValueError if the parameter groups differ in number or size.
        """
        records: dict[ParameterRecord, Mapping[str, Tensor]] = {}

        def take_state(_: torch.optim.Optimizer, loaded: dict[str, Any]) -> dict[str, Any]:
            # torch would cast every floating-point state tensor to its parameter's dtype.
            if not loaded.keys() >= {"state", "param_groups"}:
                check_saved({}, [f"found keys {sorted(loaded)}, needs state and param_groups"])
            groups = [{**self.defaults, **group} for group in loaded["param_groups"]]
            sizes = [len(group["params"]) for group in groups]
            if sizes == [len(group["params"]) for group in self.param_groups]:  # torch refuses else
                records.update(self._match(loaded["state"], groups))
            return {**loaded, "state": {}, "param_groups": groups}

        def put_state(_: torch.optim.Optimizer) -> None:
            self._restore(records)

        handles = [
            self.register_load_state_dict_pre_hook(take_state),
            self.register_load_state_dict_post_hook(put_state, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def _match(
        self, state: Mapping[Any, Mapping[str, Tensor]], groups: list[dict[str, Any]]
    ) -> dict[ParameterRecord, Mapping[str, Tensor]]:
        """Records for the loaded state, checked as a whole against the parameters."""
        options = group_problems(groups, self.defaults)
        keys = [(key, group) for group in groups for key in group["params"]]
        matched = {
            self._make_record(index, name, parameter, group): state[key]
            for (index, name, parameter, _), (key, group) in zip(self._named(), keys, strict=True)
            if state.get(key) and not options
        }
        nobodys = sorted(state.keys() - {key for key, _ in keys}, key=str)
        problems = [f"state of a parameter {key!r} that no group has" for key in nobodys]
        check_saved(matched, [*options, *problems])
        return matched

    def _restore(self, saved: Mapping[ParameterRecord, Mapping[str, Tensor]]) -> None:
        """Make ``saved`` the state of this optimizer, in memory of its own."""
        self._engine.discard(list(self._records.values()))
        self._records = {}
        self._admit(saved)

    def __getstate__(self) -> dict[str, Any]:
        """What pickling and copying keep: the state, and how the work is done."""
        self._engine.settle()
        return {**super().__getstate__(), "_runtime": self._runtime}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take pickled state, or what torch's load_state_dict hands over."""
        super().__setstate__(state)
        if "_engine" not in self.__dict__:
            self._engine = Engine(self._runtime)
            self._records = {}
            entries = self.state
            self._restore(
                {
                    self._make_record(index, name, parameter, group): entries[parameter]
                    for index, name, parameter, group in self._named()
                    if entries.get(parameter)
                }
            )
