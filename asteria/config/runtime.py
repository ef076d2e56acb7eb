"""`RuntimeConfig`: how the optimizer's work is done, never what it computes."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, fields
from fractions import Fraction
from typing import Any, Literal, get_args

import torch
import torch.distributed

from asteria.errors import ConfigError

__all__ = ["RuntimeConfig", "parse_bytes"]

Start = Literal["fresh", "eigh", "adam"]
Factors = Literal["full", "packed", "rotated"]
Nonfinite = Literal["raise", "skip"]

_UNITS = {
    unit: factor
    for power, prefix in enumerate("KMGT", start=1)
    for unit, factor in ((f"{prefix}B", 1000**power), (f"{prefix}iB", 1024**power))
} | {"B": 1, "": 1}

_CHOICES: dict[str, tuple[Any, ...]] = {
    "refresh": ("async", "sync"),
    "refresh_method": ("eigh", "qr", "ldlr", "auto"),
    "refresh_on": ("host", "device", "auto"),
    "install": ("scheduled", "ready"),
    "start": get_args(Start),
    "state_dtype": (torch.float32, torch.bfloat16),
    "factors": get_args(Factors),
    "nonfinite": get_args(Nonfinite),
    "shards": ("exact", "local"),
}
"""Every value that a field may take."""


def _is_process_group(value: object) -> bool:
    there = torch.distributed.is_available()
    return there and isinstance(value, torch.distributed.ProcessGroup)


def _unpickled(values: dict[str, Any]) -> RuntimeConfig:
    return RuntimeConfig(**values)


def parse_bytes(text: int | str) -> int:
    """Bytes of an int or of a text such as ``"8GiB"``, ``"1.5 GB"`` or ``"4096"``.

    Raises ConfigError if the text is no size or the size is negative.
    """
    if isinstance(text, int) and not isinstance(text, bool):
        size = text
    else:
        written = text if isinstance(text, str) else ""
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([KMGT]?i?B|)\s*", written)
        if match is None or match[2] not in _UNITS:
            raise ConfigError(
                f"a number of bytes was asked for, found {text!r}: "
                'give an int or a text such as "8GiB" or "500MB"'
            )
        size = int(Fraction(match[1]) * _UNITS[match[2]])
    if size < 0:
        raise ConfigError(f"a number of bytes must not be negative, found {text!r}")
    return size


@dataclass(frozen=True, kw_only=True, slots=True)
class RuntimeConfig:
    """How the optimizer's work is done: when bases are refreshed, and where state lives.

    Choosing values here changes how fresh the bases are, never the rule of the optimizer.
    Values that it does not know raise ConfigError at once.
    """

    refresh: Literal["async", "sync"] = "async"
    """`"async"`: by host threads, beside the training. `"sync"`: inside the step."""
    refresh_method: Literal["eigh", "qr", "ldlr", "auto"] = "auto"
    """`"qr"`: one warm-started orthogonal iteration; `"ldlr"`: the same step from products, two
    Cholesky factorizations and a triangular solve, which accelerators are faster at (and hosts
    slower); `"eigh"`: exact, in float64; `"auto"`: qr, and ldlr on a device
    and of rotated factors.
    """
    refresh_on: Literal["host", "device", "auto"] = "auto"
    """Where refreshes are computed.

    `"host"`: by the host, all of them. `"device"`: where the parameter is; asynchronous ones on a
    stream beside the training, for which neither the host nor a worker is needed, by LDLR unless
    ``refresh_method`` says otherwise. (Where that is host memory, nothing is beside: they are
    computed by the step that begins them.) `"auto"`: those that the step waits for (synchronous,
    first and young ones) where the parameter is, asynchronous ones on the host; of parameters
    on an accelerator, what the host has no time for beside them. That is decided once, by shapes
    and the sizes of host and device, so that a run can be repeated; by what was measured where
    ``precondition_frequency="auto"`` leaves the period to the clock, too. The parameter group
    keeps it (``"refresh_plan"``), checkpoints as well, and ``describe()`` tells it.
    """
    staleness: int = 2
    """S, in steps: an asynchronous refresh from the factors of step t is first used by step
    t + S + 1 at the latest; the step waits for it if need be. A synchronous one is first used by
    step t + 1, and so is an asynchronous one with S = 0. With ``start="fresh"`` S is 0 for factors
    that are young, as long as no early refresh is left out.
    """
    install: Literal["scheduled", "ready"] = "scheduled"
    """`"scheduled"`: exactly S steps after the launch, so that results do not depend on the host's
    speed. `"ready"`: at the first step after it is done, at the latest then.
    """
    start: Start = "fresh"
    """How the bases begin.

    `"fresh"`: built at the first step, which updates the weights by AdamW's rule; while the
    factors are young, about 8 / (1 - shampoo_beta) steps, extra refreshes at geometrically
    spaced steps. `"eigh"`: built at the first step, which changes no weight, as the published
    implementations do. `"adam"`: identity bases until the first refresh.
    """
    workers: int | None = None
    """Host threads for asynchronous refreshes; None takes the cores that training leaves free, at
    least one. Results depend on it only by the rounding of products over several threads.
    """
    max_failures: int = 10
    """Refreshes of one block that may fail in a row before step() raises RefreshError."""
    device_budget: int | str | None = None
    """Bytes of state on an accelerator, an int or a text such as ``"8GiB"``; None is what is free,
    less a reserve. What flows through a step counts, but is never less than a step needs at once.
    """
    host_budget: int | str | None = None
    """Bytes of state in host memory, which is pinned beside an accelerator; None is what is free,
    less a reserve. Where the parameters are in host memory, or share it with the device, there is
    one budget: this and ``device_budget``, if given, together.
    """
    nvme_budget: int | str | None = None
    """Bytes of state on NVMe, if there is an ``nvme_path``; None is what is free there."""
    nvme_path: str | os.PathLike[str] | None = None
    """Folder for state that fits nowhere else; None is no such tier. Each run and rank has a
    folder of its own in it, which is removed with the optimizer or with the process.
    """
    state_dtype: torch.dtype = torch.float32
    """Storage type of the eigenbases (float64 for float64 parameters whatever is set here). With
    bfloat16 they take half the memory; products are in float32 all the same.
    """
    factors: Factors = "full"
    """How Kronecker factors are kept.

    `"full"`: as square matrices.

    `"packed"`: half of each, for they are symmetric: a sixth less state of a square matrix in SOAP
    and KL-SOAP, a fifth less in KL-Shampoo. Results differ by rounding. Steps of matrices of a few
    hundred rows and more take as long as before, smaller ones up to a tenth longer; a refresh
    unpacks its factor before it begins. State dicts show factors in full.

    `"rotated"`: as square matrices, in the coordinates of the eigenbasis in use; of SOAP only. A
    refresh by LDLR, the only method then, leaves two of its exact products out, and what
    accelerators may round in the others (TF32) leaves small eigenvalues their digits; the step that
    installs a basis turns the factor, with two products more. For refreshes at every step or nearly
    so, on accelerators; hosts are slower with it.
    """
    nonfinite: Nonfinite = "raise"
    """A gradient with inf or nan: `"raise"`, or `"skip"` the step and count it."""
    trace: str | os.PathLike[str] | None = None
    """Path of a trace of steps, installs, waits and workers, for ui.perfetto.dev or
    chrome://tracing.
    """
    shards: Literal["exact", "local"] = "exact"
    """How sharded parameters (DTensor: FSDP2, HSDP, tensor parallelism) are stepped, unless their
    group says otherwise. `"exact"`: as a whole, by an owner to which the gradient is sent, with the
    same result as unsharded. `"local"`: each shard as a matrix of its own, without traffic.
    """
    process_group: Any = None
    """The processes that train the same parameters, whose gradients are equal (DDP, or an
    all-reduce by hand): a ``torch.distributed.ProcessGroup``, or `"alone"`. They share the factors
    and refreshes. None: the default group, if there is one.
    """
    node_size: int | None = None
    """Neighbouring ranks that share a node; None is found out from the launcher or the host."""

    def __post_init__(self) -> None:
        for name, known in _CHOICES.items():
            value = getattr(self, name)
            if value not in known:
                options = ", ".join(repr(option) for option in known)
                raise ConfigError(f"RuntimeConfig.{name} must be one of {options}, found {value!r}")
        if (self.refresh_on, self.refresh_method) == ("device", "eigh") and self.refresh == "async":
            raise ConfigError(
                'RuntimeConfig: refresh_on="device" with refresh_method="eigh" was asked for; '
                'eigensolvers make the host wait for the device. Use refresh_method="qr", '
                'refresh_on="host" or refresh="sync"'
            )
        self._check_factors()
        for name, least, unit in (
            ("staleness", 0, "steps"),
            ("workers", 1, "threads"),
            ("max_failures", 1, "refreshes"),
            ("node_size", 1, "ranks"),
        ):
            value = getattr(self, name)
            if value is None and name in ("workers", "node_size"):
                continue
            count = isinstance(value, int) and not isinstance(value, bool)
            if not count or value < least:
                raise ConfigError(
                    f"RuntimeConfig.{name} must be an int >= {least} ({unit}), found {value!r}"
                )
        for name, what in (("trace", "file"), ("nvme_path", "folder")):
            if not isinstance(getattr(self, name), str | os.PathLike | None):
                raise ConfigError(
                    f"RuntimeConfig.{name} must be the path of a {what}, "
                    f"found {getattr(self, name)!r}"
                )
        for name in ("device_budget", "host_budget", "nvme_budget"):
            if getattr(self, name) is not None:
                try:
                    parse_bytes(getattr(self, name))
                except ConfigError as error:
                    raise ConfigError(f"RuntimeConfig.{name}: {error}") from None
        group = self.process_group
        if group is not None and group != "alone" and not _is_process_group(group):
            raise ConfigError(
                "RuntimeConfig.process_group must be a torch.distributed.ProcessGroup, "
                f'"alone" or None, found {group!r}'
            )

    def _check_factors(self) -> None:
        """Raise ConfigError for what rotated factors do not go with."""
        if self.factors != "rotated":
            return
        for name, fits, wanted, why in (
            ("refresh_method", ("auto", "ldlr"), "ldlr", "which orthonormalizes the basis itself"),
            ("state_dtype", (torch.float32,), torch.float32, "in which a basis is orthogonal"),
        ):
            if getattr(self, name) not in fits:
                raise ConfigError(
                    f'RuntimeConfig: factors="rotated" with {name}={getattr(self, name)!r} was '
                    f"asked for; factors that turn with their basis need {wanted!r}, {why}. Use "
                    'that, or factors="full"'
                )

    @property
    def method(self) -> Literal["eigh", "qr", "ldlr", "auto"]:
        """``refresh_method``, or the only one that rotated factors have."""
        return "ldlr" if self.factors == "rotated" else self.refresh_method

    @classmethod
    def reference(cls) -> RuntimeConfig:
        """The control arm: synchronous QR refreshes, eigh start, everything on the device.

        With it the optimizers follow the published implementations' trajectories.
        """
        return cls(refresh="sync", refresh_method="qr", start="eigh", staleness=0)

    def __deepcopy__(self, memo: dict[int, Any]) -> RuntimeConfig:
        return self  # nothing in it changes

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled without a process group, which belongs to its process."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        if not isinstance(self.process_group, str):
            values["process_group"] = None
        return _unpickled, (values,)

    def __repr__(self) -> str:
        changed = (
            f"{field.name}={getattr(self, field.name)!r}"
            for field in fields(self)
            if getattr(self, field.name) != field.default
        )
        return f"RuntimeConfig({', '.join(changed)})"
