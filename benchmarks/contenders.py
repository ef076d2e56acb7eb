"""What `benchmarks.step_time` compares: the optimizers, set to one algorithm, and bare products.

Every optimizer trains its own copy of the same float32 parameters. Settings that the optimizers
name differently are translated here and nowhere else.
"""

from __future__ import annotations

import functools
import importlib
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from benchmarks.shapes import Shape, ShapeTable, factor_dims

LR = 3e-3
BETAS = (0.95, 0.95)
EPS = 1e-8
WEIGHT_DECAY = 0.01

# How heavyball runs its arithmetic: its module-wide mode for single functions, and compile_step.
# The second is its default. Which is fastest depends on the machine, so all of them take part.
HEAVYBALL_MODES: dict[str, tuple[str | None, bool]] = {
    "not compiled": (None, False),
    "functions compiled": ("max-autotune-no-cudagraphs", False),
    "whole step compiled": ("max-autotune-no-cudagraphs", True),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """The settings that all contenders share."""

    table: ShapeTable
    period: int = 10
    max_precond_dim: int = 10000
    seed: int = 0


@dataclass(kw_only=True)
class Contender:
    """Something with a step to be timed."""

    name: str
    settings: str
    """What was chosen for it, for the reader of the report."""
    step: Callable[[], object]
    inputs: Sequence[Tensor | None]
    """Where the gradients of a step are written, in the table's order; ``None``: not needed."""
    parameters: Sequence[Parameter] = ()
    """Their ``grad`` is set to ``inputs`` before each step: some optimizers drop it."""
    state: Any = None
    """Where an eigenbasis can be found, to see the refreshes."""
    compiled: bool = False
    """Whether its first steps compile, and so tell nothing."""
    prepare: Callable[[], None] = lambda: None
    """What to set before a step where the package keeps settings in module globals."""

    def load(self, gradients: Sequence[Tensor]) -> None:
        """Get ready for a step on fresh gradients, outside of what is timed."""
        self.prepare()
        for target, gradient in zip(self.inputs, gradients, strict=True):
            if target is not None:
                target.copy_(gradient)
        for parameter, target in zip(self.parameters, self.inputs, strict=bool(self.parameters)):
            parameter.grad = target

    def timed_step(self, gradients: Sequence[Tensor]) -> float:
        """Milliseconds of one step on fresh gradients."""
        self.load(gradients)
        start_s = time.perf_counter()
        self.step()
        return 1e3 * (time.perf_counter() - start_s)


def _parameters(workload: Workload) -> list[Parameter]:
    generator = torch.Generator().manual_seed(workload.seed)
    return [
        Parameter(torch.randn(shape, generator=generator).mul_(0.02))
        for shape in workload.table.shapes()
    ]


def _contender(
    name: str,
    settings: str,
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[Parameter],
    gradients: Sequence[Tensor],
) -> Contender:
    """A contender around an optimizer; ``gradients`` are the buffers all optimizers share."""
    return Contender(
        name=name,
        settings=settings,
        step=optimizer.step,
        inputs=gradients,
        parameters=parameters,
        state=optimizer.state,
    )


def asteria_soap(workload: Workload, gradients: Sequence[Tensor]) -> Contender:
    """Our SOAP as the control arm: synchronous, QR, everything on the device."""
    asteria = importlib.import_module("asteria")
    parameters = _parameters(workload)
    optimizer = asteria.SOAP(
        parameters,
        lr=LR,
        betas=BETAS,
        eps=EPS,
        weight_decay=WEIGHT_DECAY,
        precondition_frequency=workload.period,
        max_precond_dim=workload.max_precond_dim,
        runtime=asteria.RuntimeConfig.reference(),
    )
    return _contender("asteria.SOAP", "RuntimeConfig.reference()", optimizer, parameters, gradients)


def asteria_kl_shampoo(workload: Workload, gradients: Sequence[Tensor]) -> Contender:
    """Our KL-Shampoo, with its own default decay rates."""
    asteria = importlib.import_module("asteria")
    parameters = _parameters(workload)
    optimizer = asteria.KLShampoo(
        parameters,
        lr=LR,
        eps=EPS,
        weight_decay=WEIGHT_DECAY,
        precondition_frequency=workload.period,
        max_precond_dim=workload.max_precond_dim,
        runtime=asteria.RuntimeConfig.reference(),
    )
    settings = "RuntimeConfig.reference(), its own betas"
    return _contender("asteria.KLShampoo", settings, optimizer, parameters, gradients)


def pytorch_optimizer_soap_of(
    parameters: Sequence[Parameter], *, period: int, max_precond_dim: int
) -> torch.optim.Optimizer:
    """The SOAP of `pytorch_optimizer`: its defaults are the published settings.

    Raises:
        ImportError: The package is not installed.
    """
    package = importlib.import_module("pytorch_optimizer")
    optimizer: torch.optim.Optimizer = package.SOAP(
        parameters,
        lr=LR,
        betas=BETAS,
        eps=EPS,
        weight_decay=WEIGHT_DECAY,
        precondition_frequency=period,
        max_precondition_dim=max_precond_dim,
        merge_dims=False,
    )
    return optimizer


def pytorch_optimizer_soap(workload: Workload, gradients: Sequence[Tensor]) -> Contender:
    """The SOAP of `pytorch_optimizer`; raises as `pytorch_optimizer_soap_of`."""
    parameters = _parameters(workload)
    optimizer = pytorch_optimizer_soap_of(
        parameters, period=workload.period, max_precond_dim=workload.max_precond_dim
    )
    return _contender("pytorch_optimizer SOAP", "its defaults", optimizer, parameters, gradients)


def heavyball_soap_of(
    parameters: Sequence[Parameter], *, period: int, max_precond_dim: int, compile_step: bool
) -> torch.optim.Optimizer:
    """The SOAP of `heavyball`, set to the published algorithm instead of its own defaults.

    No precondition schedule and no merged dimensions. Its refresh clock adds up ``1 / period`` in
    floating point, which at period 10 comes one step late now and then (steps 11, 20, 30, 40, 51);
    an exact fraction makes it regular.

    Raises:
        ImportError: The package is not installed.
    """
    heavyball = importlib.import_module("heavyball")
    optimizer: Any = heavyball.SOAP(
        parameters,
        lr=LR,
        betas=BETAS,
        shampoo_beta=BETAS[1],
        eps=EPS,
        weight_decay=WEIGHT_DECAY,
        precondition_frequency=period,
        max_precond_dim=max_precond_dim,
        merge_dims=False,
        use_precond_schedule=False,
        compile_step=compile_step,
    )
    share = Fraction(1, period)
    optimizer.precond_schedule = lambda _step: share
    found: torch.optim.Optimizer = optimizer
    return found


def heavyball_soap(
    workload: Workload, gradients: Sequence[Tensor], mode: str = "not compiled"
) -> Contender:
    """The SOAP of `heavyball` in one of its modes; raises as `heavyball_soap_of`."""
    heavyball = importlib.import_module("heavyball")
    _quiet_compiler()
    compile_mode, compile_step = HEAVYBALL_MODES[mode]
    parameters = _parameters(workload)
    optimizer = heavyball_soap_of(
        parameters,
        period=workload.period,
        max_precond_dim=workload.max_precond_dim,
        compile_step=compile_step,
    )
    settings = f"f={workload.period}, no schedule, no merged dims"
    contender = _contender(f"heavyball SOAP, {mode}", settings, optimizer, parameters, gradients)
    contender.compiled = compile_mode is not None
    contender.prepare = lambda: setattr(heavyball.utils, "compile_mode", compile_mode)
    return contender


def _quiet_compiler() -> None:
    """Compile in this process and without a report of every autotuned product."""
    inductor: Any = importlib.import_module("torch._inductor.config")
    inductor.autotune_num_choices_displayed = 0
    inductor.compile_threads = 1
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\._inductor")


def torch_adamw(workload: Workload, gradients: Sequence[Tensor]) -> Contender:
    """AdamW of torch in its fastest form, for scale."""
    parameters = _parameters(workload)
    optimizer = torch.optim.AdamW(
        parameters, lr=LR, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY, fused=True
    )
    return _contender("torch AdamW", "fused", optimizer, parameters, gradients)


@dataclass(kw_only=True)
class _Stack:
    """All matrices of one shape, (b, m, n), with their bases; ``None`` where a side has none."""

    gradient: Tensor
    left: Tensor | None
    right: Tensor | None

    @classmethod
    def of(cls, shape: Shape, count: int, max_precond_dim: int) -> _Stack:
        def bases(dim: int) -> Tensor | None:
            if dim > max_precond_dim:
                return None
            basis: Tensor = torch.linalg.qr(torch.randn(dim, dim)).Q
            return basis.repeat(count, 1, 1)

        rows, columns = shape
        gradient = torch.zeros(count, rows, columns)
        return cls(gradient=gradient, left=bases(rows), right=bases(columns))

    def products(self) -> None:
        """Project with two products, project back with two, and fold two factors."""
        gradient, left, right = self.gradient, self.left, self.right
        projected = gradient
        if left is not None:
            projected = torch.bmm(left.mT, projected)
        if right is not None:
            projected = torch.bmm(projected, right)
        if left is not None:
            projected = torch.bmm(left, projected)
        if right is not None:
            projected = torch.bmm(projected, right.mT)
        if left is not None:
            torch.bmm(gradient, gradient.mT)
        if right is not None:
            torch.bmm(gradient.mT, gradient)


def bare_products(workload: Workload, gradients: Sequence[Tensor]) -> Contender:
    """The matrix products that no SOAP update can do without, same-shaped blocks stacked."""
    del gradients
    stacks = {
        shape: _Stack.of(shape, count, workload.max_precond_dim)
        for shape, count in workload.table.counts().items()
        if factor_dims(shape, workload.max_precond_dim)
    }
    slots = {shape: iter(stack.gradient) for shape, stack in stacks.items()}
    inputs = [next(slots[shape]) if shape in slots else None for shape in workload.table.shapes()]

    def step() -> None:
        for stack in stacks.values():
            stack.products()

    settings = "torch.bmm, same shapes stacked"
    return Contender(name="bare products", settings=settings, step=step, inputs=inputs)


OURS, BARE = "asteria.SOAP", "bare products"
PEERS = ("pytorch_optimizer SOAP", *(f"heavyball SOAP, {mode}" for mode in HEAVYBALL_MODES))
COMPILED = PEERS[2:]
AS_THEY_COME = PEERS[0], PEERS[2]
BUILDERS: dict[str, Callable[[Workload, Sequence[Tensor]], Contender]] = {
    OURS: asteria_soap,
    "asteria.KLShampoo": asteria_kl_shampoo,
    PEERS[0]: pytorch_optimizer_soap,
    **{
        f"heavyball SOAP, {mode}": functools.partial(heavyball_soap, mode=mode)
        for mode in HEAVYBALL_MODES
    },
    "torch AdamW": torch_adamw,
    BARE: bare_products,
}
