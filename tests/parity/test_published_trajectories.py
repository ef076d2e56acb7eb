"""C1: the trajectories of the published implementations, recorded in tests/fixtures."""

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.parity.replay import assert_follows, replay_asteria, replay_reference
from tests.reference.soap import Array

FIXTURES = Path(__file__).parents[1] / "fixtures"
CASES: dict[str, dict[str, Any]] = json.loads(
    (FIXTURES / "reference_trajectories.json").read_text(encoding="utf-8")
)


@functools.cache
def recorded(name: str, kind: str) -> list[Array]:
    """Arrays of one case, one for each parameter; ``kind`` is p0, grads or params."""
    with np.load(FIXTURES / "reference_trajectories.npz") as arrays:
        return [arrays[f"{name}/{kind}/{j}"] for j in range(len(CASES[name]["shapes"]))]


@pytest.mark.parametrize("name", CASES)
def test_asteria_follows_the_published_trajectory(name: str) -> None:
    """All parameters of a case share one optimizer, as they did when recorded."""
    case = CASES[name]
    starts, gradients = recorded(name, "p0"), recorded(name, "grads")
    actual = replay_asteria(case["optimizer"], case["kwargs"], starts, gradients, torch.float32)
    for trajectory, expected, start in zip(actual, recorded(name, "params"), starts, strict=True):
        assert_follows(trajectory, expected, start, "asteria float32, published float32")


@pytest.mark.parametrize("name", CASES)
def test_the_reference_follows_the_published_trajectory(name: str) -> None:
    """What the other parity tests compare with is itself held to the published programs."""
    case = CASES[name]
    columns = (recorded(name, kind) for kind in ("p0", "grads", "params"))
    for start, gradients, expected in zip(*columns, strict=True):
        actual = replay_reference(case["optimizer"], case["kwargs"], start, gradients)
        assert_follows(actual, expected, start, "reference float64, published float32")


def test_the_recorded_cases_are_all_here() -> None:
    """A truncated copy of the fixtures must not pass as parity."""
    assert len(CASES) == 13
    for name, case in CASES.items():
        shapes = [array.shape[1:] for array in recorded(name, "params")]
        assert shapes == [tuple(shape) for shape in case["shapes"]]
        assert {len(array) for array in recorded(name, "grads")} == {case["steps"]}
