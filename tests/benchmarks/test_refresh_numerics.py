"""The study of refreshes: what it records, follows and counts."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from asteria.linalg.eigenbasis import BasisResult, orthogonal_iteration
from benchmarks import factor_stream, near_singular, refresh_numerics
from benchmarks.factor_stream import Stream
from benchmarks.refresh_trackers import Rounding, Tracker, make_trackers, permitted
from tests.linalg.matrices import rotations

Folder = Path


def stream(size: int = 6, steps: int = 5) -> Stream:
    gradients = torch.randn(steps, size, 4, generator=torch.Generator().manual_seed(0))
    root = torch.randn(size, size, generator=torch.Generator().manual_seed(1))
    return Stream(gradients=gradients, left=root @ root.T, right=torch.eye(4))


def test_factors_are_the_moving_average_of_both_sides() -> None:
    one = stream()
    left, right = list(one.factors("left", 0.9)), list(one.factors("right", 0.9))
    wanted = one.left
    for gradient, factor in zip(one.gradients, left, strict=True):
        wanted = 0.9 * wanted + 0.1 * gradient @ gradient.T
        torch.testing.assert_close(factor[0], wanted)
    first = one.gradients[0]
    torch.testing.assert_close(right[0][0], 0.9 * torch.eye(4) + 0.1 * first.T @ first)


def test_a_stream_survives_its_file(tmp_path: Folder) -> None:
    one = stream()
    factor_stream.save({"w": one}, tmp_path / "s.npz")
    found = factor_stream.load(tmp_path / "s.npz")["w"]
    torch.testing.assert_close(found.gradients, one.gradients, rtol=1e-3, atol=1e-4)
    assert torch.equal(found.left, one.left)
    assert torch.equal(found.right, one.right)


def test_a_run_is_recorded(tmp_path: Folder) -> None:
    recorded = factor_stream.record(["blocks.0.v.weight"], width=8, first=2, count=3, steps=5)[
        "blocks.0.v.weight"
    ]
    assert recorded.gradients.shape == (3, 8, 8)
    assert (recorded.left - recorded.left.T).abs().max() < 1e-6
    assert recorded.left.norm() > 0


def test_a_tracker_refreshes_in_its_period_and_counts_what_fails() -> None:
    calls = []

    def refresh(factor: Tensor, basis: Tensor) -> BasisResult:
        calls.append(factor)
        usable = torch.tensor([len(calls) != 2])
        return BasisResult(basis.flip(-1), usable)

    tracker = Tracker("some", refresh, period=3)
    tracker.begin(torch.eye(4).unsqueeze(0), torch.eye(4).unsqueeze(0))
    for step in range(1, 10):
        tracker.advance(step, torch.eye(4).unsqueeze(0), torch.ones(4, 1))
    assert len(calls) == 3
    assert tracker.failures == 1
    assert torch.equal(tracker.basis[0], torch.eye(4)), "flipped twice"


def test_measures_are_zero_in_the_eigenbasis_and_not_elsewhere() -> None:
    factor = torch.diag(torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64)).unsqueeze(0)
    spectrum, floor = torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64), 4e-7
    log = float((spectrum + floor).log().sum())
    tracker = Tracker("some", orthogonal_iteration)
    for basis in (torch.eye(3), rotations(1, 3, 1)[0].float()):
        tracker.begin(factor, basis.unsqueeze(0))
        tracker.measure(factor, log, floor)
    assert tracker.off[0] == 0
    assert abs(tracker.kl[0]) < 1e-12
    assert tracker.off[1] > 0.05
    assert tracker.kl[1] > 0.01


@pytest.mark.parametrize(("kind", "digits"), [("tf32", 11), ("bf16", 8)])
def test_rounding_keeps_as_many_bits_as_it_says(kind: str, digits: int) -> None:
    one = torch.ones(1, 1, 1)
    fine, coarse = (torch.full((1, 1, 1), 1 + 2.0**-n) for n in (digits + 1, digits - 1))
    added = torch.full((1, 1, 1), 2.0**-20)
    with Rounding(kind):
        assert torch.bmm(one, fine).item() == 1
        assert torch.bmm(one, coarse).item() > 1
        assert torch.baddbmm(added, one, one).item() == 1 + 2.0**-20, "what is added is not rounded"
        assert torch.bmm(one.double(), fine.double()).item() > 1, "float64 is not rounded"


def test_where_rounding_is_permitted_exact_products_know_it() -> None:
    basis = torch.linalg.qr(torch.randn(1, 32, 32, generator=torch.Generator().manual_seed(0))).Q
    factor = (basis * torch.logspace(0, -4, 32)) @ basis.mT
    exact = orthogonal_iteration(factor, basis, sort=True).basis
    with permitted("bf16"):
        allowed = orthogonal_iteration(factor, basis, sort=True)
    with Rounding("bf16"):
        rounded = orthogonal_iteration(factor, basis, sort=True)
    assert (allowed.basis - exact).abs().max() < 1e-3
    assert (rounded.basis - exact).abs().max() > 1e-2


@pytest.mark.parametrize("kind", near_singular.KINDS)
def test_gradients_are_of_their_kind(kind: str) -> None:
    one = next(near_singular.gradients(kind, 12, seed=0))
    assert one.shape[:2] == (near_singular.BLOCKS, 12)
    spectrum = torch.linalg.svdvals(one.double()).square()
    ratio = spectrum[:, -1] / spectrum[:, 0]
    expected = {"condition 1e6": 1e-6, "condition 1e9": 1e-9}
    if kind in expected:
        assert (ratio < 30 * expected[kind]).all()
    if kind == "all but identity":
        assert (ratio > 0.99).all()
    if kind == "half of the rows zero":
        assert one[:, 6:].abs().max() == 0


def test_all_studies_are_printed_written_and_drawn(
    tmp_path: Folder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(refresh_numerics, "make_trackers", lambda: make_trackers()[:4])
    threads = torch.get_num_threads()
    factor_stream.save({"some.weight": stream()}, tmp_path / "s.npz")
    target = tmp_path / "out.json"
    given = ["--stream", str(tmp_path / "s.npz"), "--refreshes", "240", "--drift", "4"]
    try:
        refresh_numerics.main([*given, "--largest", "6", "--json", str(target)])
    finally:
        torch.set_num_threads(threads)
    report = json.loads(target.read_text())
    assert [found["factor"] for found in report["factors"]] == ["some left", "some right"]
    assert report["near_singular"]["ldlr"]["unhandled"] == 0
    assert report["near_singular"]["ldlr"]["refreshes"] == 240
    assert len(report["drift"]["float32"]) == 4
    assert target.with_suffix(".png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "CholeskyQR2" in printed
    assert "kept in its eigenbasis" in printed
