"""Finding non-finite gradients, and gating the steps that have them."""

import pytest
import torch
from torch import Tensor

from asteria.errors import NonFiniteGradientError
from asteria.runtime.guard import (
    DeviceGuard,
    finite_flags,
    gate_on,
    nonfinite_error,
    surely_finite,
)

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
NAN, INF = float("nan"), float("inf")


def gradients(dtypes: list[torch.dtype]) -> list[Tensor]:
    return [torch.linspace(-2, 3, 12).to(dtype).view(3, 4) for dtype in dtypes]


def verdicts(given: list[Tensor]) -> dict[int, bool]:
    """Whether each gradient is finite, by its place; gradients that were left out are absent."""
    names, flags = finite_flags([str(place) for place in range(len(given))], given)
    assert flags.dtype == torch.bool
    assert flags.shape == (len(names),)
    return {int(name): ok for name, ok in zip(names, flags.tolist(), strict=True)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("place", [(0, 0), (1, 2), (2, 3)])
def test_one_bad_number_is_found_wherever_it_is(
    dtype: torch.dtype, bad: float, place: tuple[int, int]
) -> None:
    given = gradients([dtype] * 3)
    given[1][place] = bad
    assert verdicts(given) == {0: True, 1: False, 2: True}


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_quick_look_misses_nothing(dtype: torch.dtype) -> None:
    assert surely_finite([*gradients([dtype] * 3), torch.zeros(0, dtype=dtype)])
    for bad in (NAN, INF, -INF):
        given = gradients([dtype] * 3)
        given[1][1, 2] = bad
        assert not surely_finite(given)
    assert not surely_finite([torch.tensor([INF, -INF]), torch.tensor([-INF, INF])])


def test_nan_is_found_beside_infinity_and_among_large_numbers() -> None:
    given = [torch.tensor([NAN, INF]), torch.tensor([1e18, NAN, 1e18]), torch.tensor([1e18] * 3)]
    assert verdicts(given) == {0: False, 1: False, 2: True}


@pytest.mark.parametrize("bad", range(8))
def test_mixed_dtypes_keep_their_places(bad: int) -> None:
    given = gradients(DTYPES + DTYPES[::-1])
    given[bad][1, 1] = NAN
    assert verdicts(given) == {index: index != bad for index in range(8)}


@pytest.mark.parametrize(
    ("dtype", "passes", "fails"),
    [
        (torch.float64, 1e150, 1e160),
        (torch.float32, 1e17, 1e20),
        (torch.bfloat16, 1e17, 1e20),
        (torch.float16, 6e4, INF),
    ],
)
def test_squares_must_fit_the_state(dtype: torch.dtype, passes: float, fails: float) -> None:
    given = [torch.full((1000,), value, dtype=dtype) for value in (passes, -passes, fails, -fails)]
    assert verdicts(given) == {0: True, 1: True, 2: False, 3: False}


def test_empty_gradients_are_left_out() -> None:
    assert verdicts([torch.zeros(0), torch.zeros(2, 0, 3)]) == {}
    given = [torch.zeros(0), torch.tensor([NAN]), torch.zeros(0, 4), torch.tensor([1.0])]
    assert verdicts(given) == {1: False, 3: True}
    assert float(DeviceGuard().gate([torch.zeros(0)], ["a"])) == 1.0


def test_any_shape_and_layout() -> None:
    bad = torch.zeros(4, 6)
    bad[3, 1] = INF
    given = [torch.tensor(1.0), torch.tensor(NAN), bad.T, bad[:3].T, bad.T[1:2, 3:]]
    assert verdicts(given) == {0: True, 1: False, 2: False, 3: True, 4: False}


def test_looking_changes_nothing() -> None:
    given = gradients(DTYPES)
    before = [gradient.clone() for gradient in given]
    verdicts(given)
    assert all(torch.equal(one, other) for one, other in zip(given, before, strict=True))


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (1, "the gradient of p0 holds"),
        (5, "the gradient of p0, p1, p2, p3, p4 holds"),
        (6, "the gradient of p0, p1, p2, p3, p4 and 1 more holds"),
        (12, "the gradient of p0, p1, p2, p3, p4 and 7 more holds"),
    ],
)
def test_the_error_names_the_parameters_and_the_way_out(count: int, shown: str) -> None:
    error = nonfinite_error([f"p{index}" for index in range(count)])
    assert isinstance(error, NonFiniteGradientError)
    message = str(error)
    assert shown in message
    assert 'RuntimeConfig(nonfinite="skip")' in message
    assert "weights and optimizer state were left as they were" in message


def test_a_gate_is_open_for_finite_gradients_and_closed_for_others() -> None:
    guard, names = DeviceGuard(), ["a", "b"]
    fine = [torch.ones(3), torch.ones(2, 2, dtype=torch.float64)]
    bad = [torch.ones(3), torch.full((2, 2), NAN, dtype=torch.float64)]
    opened, closed = guard.gate(fine, names), guard.gate(bad, names)
    assert (opened.dtype, opened.shape, float(opened)) == (torch.float32, (), 1.0)
    assert (closed.dtype, closed.shape, float(closed)) == (torch.float32, (), 0.0)


@pytest.mark.parametrize("wait", [False, True])
def test_every_gated_step_is_told_once_with_its_names(wait: bool) -> None:
    guard = DeviceGuard()
    for bad in ([1], [], [0, 2]):
        given = [torch.ones(2) for _ in range(3)]
        for index in bad:
            given[index][1] = INF
        guard.gate(given, ["a", "b", "c"])
    assert guard.collect(wait=wait) == [["b"], ["a", "c"]]
    assert guard.collect(wait=wait) == []


def test_the_names_of_a_gated_step_are_those_of_its_bad_gradients() -> None:
    """Whatever the dtypes, by which the gradients are looked at, and with empty ones between."""
    guard = DeviceGuard()
    given = [*gradients(DTYPES), torch.zeros(0), *gradients(DTYPES)]
    given[1][0, 0] = given[6][2, 2] = NAN
    guard.gate(given, list("abcdefghi"))
    (names,) = guard.collect()
    assert sorted(names) == ["b", "g"]


def test_what_a_refused_step_did_is_taken_back_once() -> None:
    guard, done = DeviceGuard(), list[str]()
    for name, value in (("a", 1.0), ("b", NAN), ("c", INF), ("d", 1.0)):
        guard.gate([torch.tensor([value])], [name])
        guard.on_refusal(lambda name=name: done.append(name))
    assert done == []
    assert guard.collect() == [["b"], ["c"]]
    assert done == ["b", "c"]
    assert guard.collect(wait=True) == []
    assert done == ["b", "c"]


class LateEvent:
    """An event of a device that arrives when it is told to, or waited for."""

    def __init__(self) -> None:
        self.here = False

    def query(self) -> bool:
        return self.here

    def synchronize(self) -> None:
        self.here = True


def test_a_verdict_that_is_still_on_its_way_keeps_its_place() -> None:
    guard = DeviceGuard()
    for name in ("a", "b"):
        guard.gate([torch.tensor([NAN])], [name])
    event = LateEvent()
    guard._verdicts[0].report._arrived = event
    assert guard.collect() == []
    event.here = True
    assert guard.collect() == [["a"], ["b"]]


def test_waiting_fetches_every_verdict() -> None:
    guard = DeviceGuard()
    guard.gate([torch.tensor([NAN])], ["a"])
    event = LateEvent()
    guard._verdicts[0].report._arrived = event
    assert guard.collect(wait=True) == [["a"]]
    assert event.here, "read only once it has arrived"


class Sent:
    """Stands for a tensor on an accelerator; knows how it was sent."""

    def to(self, **how: object) -> "Sent":
        self.how = how
        return self


@pytest.mark.parametrize(("device", "waits"), [("cpu", True), ("cuda:1", False)])
def test_only_a_host_waits_for_the_gate(device: str, waits: bool) -> None:
    """It would look at the memory before the copy has arrived."""
    gate = Sent()
    assert gate_on(gate, torch.device(device), torch.float64) is gate  # type: ignore[arg-type,comparison-overlap]
    assert gate.how == {
        "device": torch.device(device),
        "dtype": torch.float64,
        "non_blocking": not waits,
    }
    assert gate_on(None, torch.device(device), torch.float32) is None


def test_flags_of_mixed_devices_are_brought_together_on_an_accelerator() -> None:
    """On the host they would be read before they have arrived."""
    mixed = [torch.ones(2), torch.ones(2, device="meta"), torch.ones(3)]
    names, flags = finite_flags(["a", "b", "c"], mixed)
    assert flags.device.type == "meta"
    assert sorted(names) == ["a", "b", "c"]
