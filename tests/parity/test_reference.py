"""C1 in float64: asteria in reference mode against the independent references, over everything.

Null spaces. A tall or wide matrix, a column or a vector has a singular factor after one gradient,
and the basis of its null space is the eigensolver's choice. Such shapes are therefore tested twice:
with gradients that never enter the null space, and with unrestricted ones after a first gradient
whose factors are exactly diagonal, so that there is nothing to choose (see ``gradients.py``).
"""

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import asteria
from tests.parity.replay import (
    ASTERIA,
    REFERENCE,
    assert_follows,
    asteria_options,
    replay_asteria,
    replay_reference,
)
from tests.reference.gradients import aligned_start, is_regular, within_subspace
from tests.reference.soap import Array

STEPS = 25
TOLERANCE = "asteria float64, reference float64"
Shape = tuple[int, ...]
Options = dict[str, Any]

NEVER = STEPS + 1
"""A precondition frequency with which the first bases stay."""

DEAD_DIRECTIONS_EPS = 1e-3
"""Where gradients avoid a null space: keeps rounding noise in it from being normalized."""

SHAPES: list[Shape] = [
    (),
    (1,),
    (7,),
    (8, 8),
    (9, 4),
    (4, 9),
    (6, 1),
    (1, 6),
    (5, 4, 3),
    (1, 5, 4),
    (5, 2, 3, 4),
    (12, 3, 2, 2),
    (3, 2, 2, 2, 3),
]
COMMON_OPTIONS: dict[str, Options] = {
    "f1": {"precondition_frequency": 1},
    "f3": {"precondition_frequency": 3, "weight_decay": 0.1},
    "f10": {"precondition_frequency": 10, "weight_decay": 0.0},
    "betas": {"precondition_frequency": 3, "betas": (0.8, 0.97)},
    "no-momentum": {"precondition_frequency": 3, "betas": (0.0, 0.9)},
    "shampoo-beta": {"precondition_frequency": 3, "shampoo_beta": 0.8},
    "normalized": {"precondition_frequency": 3, "normalize_grads": True},
    "one-sided": {"precondition_frequency": 3, "max_precond_dim": 5},
    "diagonal": {"precondition_frequency": 3, "max_precond_dim": 1},
}
SOAP_OPTIONS = COMMON_OPTIONS | {
    "uncorrected": {"precondition_frequency": 3, "correct_bias": False},
    "merge-5": {"precondition_frequency": 3, "merge_dims": True, "max_precond_dim": 5},
    "merge-12": {"precondition_frequency": 3, "merge_dims": True, "max_precond_dim": 12},
    "merge-all": {"precondition_frequency": NEVER, "merge_dims": True},
    "vectors": {"precondition_frequency": 10, "precondition_1d": True},
    "vectors-6": {"precondition_frequency": 3, "precondition_1d": True, "max_precond_dim": 6},
    "last-12": {
        "precondition_frequency": 3,
        "merge_dims": True,
        "max_precond_dim": 12,
        "data_format": "channels_last",
    },
    "last-unmerged": {"precondition_frequency": 3, "data_format": "channels_last"},
}
KL_OPTIONS = COMMON_OPTIONS | {
    "scaled": {"precondition_frequency": 3, "init_factor": None},
    "scaled-normalized": {
        "precondition_frequency": 3,
        "init_factor": None,
        "normalize_grads": True,
    },
    "scaled-bound": {"precondition_frequency": 3, "init_factor": None, "max_clamp_value": 3},
    "scaled-unbounded": {
        "precondition_frequency": 3,
        "init_factor": None,
        "using_clamping": False,
    },
    "scaled-one-sided": {
        "precondition_frequency": 3,
        "init_factor": None,
        "max_precond_dim": 5,
    },
    "init-1e-3": {"precondition_frequency": 3, "init_factor": 1e-3},
    "init-1": {"precondition_frequency": 3, "init_factor": 1.0},
    "damped": {"precondition_frequency": 3, "using_damping": True, "eps": 1e-3},
    "scaled-damped": {
        "precondition_frequency": 3,
        "init_factor": None,
        "using_damping": True,
        "eps": 1e-3,
    },
    "bound": {"precondition_frequency": 3, "max_clamp_value": 3, "gradient_scale": 0.02},
    "unbounded": {"precondition_frequency": 3, "using_clamping": False, "gradient_scale": 0.02},
}
OPTIONS = {"SOAP": SOAP_OPTIONS, "KL-Shampoo": KL_OPTIONS, "KL-SOAP": KL_OPTIONS}


class Case(NamedTuple):
    """One run: gradients ``start`` is "subspace" or "aligned"."""

    optimizer: str
    shape: Shape
    options: Options
    start: str

    def build(self, seed: int) -> tuple[Array, Array]:
        """First parameter (*shape) and gradients (STEPS, *shape)."""
        rng = np.random.default_rng(seed)
        first = np.asarray(rng.normal(size=self.shape))
        reference = REFERENCE[self.optimizer](first, **published(self.options))
        make = aligned_start if self.start == "aligned" else within_subspace
        return first, make(reference, STEPS, rng) * self.options.get("gradient_scale", 1.0)


def published(options: Options) -> Options:
    """Without what is not an option of the optimizer; lr large enough to be seen."""
    return {"lr": 0.01} | {k: v for k, v in options.items() if k != "gradient_scale"}


def sound_cases(optimizer: str, shape: Shape, options: Options) -> list[Case]:
    """The runs of this shape whose trajectory does not depend on a null space's basis."""
    reference = REFERENCE[optimizer](np.zeros(shape), **published(options))
    period = options["precondition_frequency"]
    if is_regular(reference):
        return [Case(optimizer, shape, options, "subspace")]
    eps = {"eps": DEAD_DIRECTIONS_EPS}
    cases = [Case(optimizer, shape, options | eps, "subspace")]
    if optimizer == "SOAP" and (period == NEVER or is_regular(reference, period)):
        cases.append(Case(optimizer, shape, options, "aligned"))
    if optimizer != "SOAP":  # no sorting: a refresh would depend on the order in the null space
        never = {"precondition_frequency": NEVER}
        cases.append(Case(optimizer, shape, options | never, "aligned"))
    return cases


def applies(optimizer: str, shape: Shape, name: str) -> bool:
    """Whether the option changes anything for the shape: KL's Adam rule knows only a few."""
    one_dim = sum(size > 1 for size in shape) < 2
    return optimizer == "SOAP" or not one_dim or name in ("f3", "betas", "normalized")


CASES = {
    f"{optimizer}-{'x'.join(map(str, shape)) or 'scalar'}-{name}-{case.start}": case
    for optimizer, table in OPTIONS.items()
    for shape in SHAPES
    for name, options in table.items()
    if applies(optimizer, shape, name)
    for case in sound_cases(optimizer, shape, options)
}


@pytest.mark.parametrize("name", CASES)
def test_one_parameter(name: str) -> None:
    case = CASES[name]
    start, gradients = case.build(seed=len(name))
    options = published(case.options)
    (actual,) = replay_asteria(case.optimizer, options, [start], [gradients], torch.float64)
    expected = replay_reference(case.optimizer, options, start, gradients)
    assert_follows(actual, expected, start, TOLERANCE)


def drawn_options(optimizer: str, rng: np.random.Generator) -> Options:
    """A random combination: each option is drawn by itself, nothing is left at its default."""

    def pick(*values: Any) -> Any:
        return values[rng.integers(len(values))]

    options = {
        "lr": pick(1e-3, 1e-2, 1e-1),
        "betas": pick((0.9, 0.95), (0.95, 0.95), (0.9, 0.98), (0.0, 0.9)),
        "shampoo_beta": pick(-1, 0.8, 0.9),
        "eps": DEAD_DIRECTIONS_EPS,
        "weight_decay": pick(0.0, 0.01, 0.1),
        "precondition_frequency": pick(1, 2, 3, 10),
        "max_precond_dim": pick(10000, 12, 8, 5, 3),
        "normalize_grads": pick(False, True),
    }
    if optimizer == "SOAP":
        return options | {
            "merge_dims": pick(False, True),
            "precondition_1d": pick(False, True),
            "correct_bias": pick(False, True),
            "data_format": pick("channels_first", "channels_last"),
        }
    return options | {
        "init_factor": pick(None, None, 0.1, 1.0, 1e-2),
        "using_damping": pick(False, True),
        "using_clamping": pick(False, True),
        "max_clamp_value": pick(4000, 12, 2),
    }


@pytest.mark.parametrize("optimizer", REFERENCE)
@pytest.mark.parametrize("seed", range(8))
def test_drawn_options_and_several_parameters(optimizer: str, seed: int) -> None:
    """Ten parameters of drawn shapes, so some equal, share an optimizer with drawn options."""
    rng = np.random.default_rng(1000 + seed)
    options = drawn_options(optimizer, rng)
    shapes = [SHAPES[index] for index in rng.integers(len(SHAPES), size=10)]
    built = [
        Case(optimizer, shape, options, "subspace").build(100 * seed + index)
        for index, shape in enumerate(shapes)
    ]
    starts, gradients = [start for start, _ in built], [given for _, given in built]
    trajectories = replay_asteria(optimizer, options, starts, gradients, torch.float64)
    for start, given, actual in zip(starts, gradients, trajectories, strict=True):
        expected = replay_reference(optimizer, options, start, given)
        assert_follows(actual, expected, start, TOLERANCE)


@pytest.mark.parametrize("optimizer", REFERENCE)
def test_parameters_that_sometimes_have_no_gradient(optimizer: str) -> None:
    """Each parameter counts its own steps: those without a gradient do not exist for it."""
    rng = np.random.default_rng(5)
    options = {"precondition_frequency": 3, "weight_decay": 0.1}
    shapes: list[Shape] = [(6, 6), (6, 6), (6, 6), (6, 6), (7,), (7,), (5, 4, 3), (5, 4, 3)]
    built = [
        Case(optimizer, shape, options, "subspace").build(seed) for seed, shape in enumerate(shapes)
    ]
    starts, gradients = [], []
    for start, given in built:
        starts.append(start)
        gradients.append([gradient if rng.random() < 0.6 else None for gradient in given])
    trajectories = replay_asteria(optimizer, published(options), starts, gradients, torch.float64)
    for start, present, actual in zip(starts, gradients, trajectories, strict=True):
        expected = replay_reference(optimizer, published(options), start, present)
        assert_follows(actual, expected, start, TOLERANCE)


@pytest.mark.parametrize("optimizer", REFERENCE)
def test_a_stack_of_matrices_is_as_many_parameters(optimizer: str) -> None:
    """The published programs have no stacks: to them this is one block of rank 3."""
    options = {"precondition_frequency": 3}
    built = [Case(optimizer, (32, 32), options, "subspace").build(seed) for seed in range(3)]
    start = np.stack([matrix for matrix, _ in built])
    gradients = np.stack([given for _, given in built], axis=1)
    arguments = (optimizer, published(options))
    (actual,) = replay_asteria(*arguments, [start], [gradients], torch.float64, batch_dims=1)
    for index, (matrix, given) in enumerate(built):
        expected = replay_reference(*arguments, matrix, given)
        assert_follows(actual[:, index], expected, matrix, TOLERANCE)


@pytest.mark.parametrize("optimizer", REFERENCE)
def test_the_control_arm_guesses_no_stacks(optimizer: str) -> None:
    """By default a parameter of this shape is a stack; the published programs have none."""
    options = {"precondition_frequency": 3}
    start, gradients = Case(optimizer, (3, 32, 32), options, "subspace").build(9)
    reference = REFERENCE[optimizer](start, **published(options))
    parameter = torch.nn.Parameter(torch.tensor(start))
    stepper = ASTERIA[optimizer](
        [parameter],
        **asteria_options(optimizer, published(options)),
        runtime=asteria.RuntimeConfig.reference(),
    )
    actual, expected = [], []
    for gradient in gradients:
        parameter.grad = torch.tensor(gradient)
        stepper.step()
        actual.append(parameter.detach().numpy().copy())
        expected.append(reference.step(gradient))
    assert_follows(np.stack(actual), np.stack(expected), start, TOLERANCE)


SCALED: Options = {"init_factor": None, "eps": 1e-30, "weight_decay": 0.0}


@pytest.mark.parametrize("scale", [2.0**-30, 2.0**20])
@pytest.mark.parametrize("shape", [(8, 8), (9, 4), (5, 4, 3), (5, 2, 3, 4)])
@pytest.mark.parametrize("optimizer", ["KL-Shampoo", "KL-SOAP"])
def test_without_init_factor_the_gradient_scale_is_immaterial(
    optimizer: str, shape: Shape, scale: float
) -> None:
    options = SCALED | {"precondition_frequency": 3 if shape != (9, 4) else NEVER}
    start, gradients = Case(optimizer, shape, options, "aligned").build(3)
    arguments = (optimizer, published(options), [start])
    (plain,) = replay_asteria(*arguments, [gradients], torch.float64)
    (scaled,) = replay_asteria(*arguments, [gradients * scale], torch.float64)
    assert_follows(scaled, plain, start, TOLERANCE)


@pytest.mark.parametrize("damping", [False, True])
@pytest.mark.parametrize("shape", [(8, 8), (9, 4), (5, 4, 3)])
@pytest.mark.parametrize("optimizer", ["KL-Shampoo", "KL-SOAP"])
def test_a_zero_first_gradient_leaves_the_scale_to_the_next(
    optimizer: str, shape: Shape, damping: bool
) -> None:
    """Never refreshed: the basis of a zero factor is coordinate axes in some order."""
    options = {"init_factor": None, "precondition_frequency": NEVER, "using_damping": damping}
    start, gradients = Case(optimizer, shape, options, "aligned").build(4)
    gradients[:3] = 0.0
    (actual,) = replay_asteria(optimizer, published(options), [start], [gradients], torch.float64)
    expected = replay_reference(optimizer, published(options), start, gradients)
    assert_follows(actual, expected, start, TOLERANCE)


def test_the_learning_rate_is_read_at_every_step() -> None:
    """And the bias correction, the decay and the refreshes do not depend on its history."""
    start, gradients = Case("SOAP", (8, 8), {}, "subspace").build(7)
    reference = REFERENCE["SOAP"](start, precondition_frequency=3)
    parameter = torch.nn.Parameter(torch.tensor(start))
    optimizer = asteria.SOAP(
        [parameter], precondition_frequency=3, runtime=asteria.RuntimeConfig.reference()
    )
    for step, gradient in enumerate(gradients):
        optimizer.param_groups[0]["lr"] = reference.lr = 0.01 / (1 + step)
        parameter.grad = torch.tensor(gradient)
        optimizer.step()
        expected = reference.step(gradient)
        assert np.abs(parameter.detach().numpy() - expected).max() < 1e-11
