"""Each factor is kept, accumulated and refreshed once; new bases travel, and nothing else."""

from collections import Counter
from typing import Any

import pytest
import torch

from asteria import ConfigError, RuntimeConfig
from asteria.distributed.coherence import Coherence
from asteria.distributed.spread import sent_bytes
from asteria.distributed.topology import Link, Topology
from asteria.store.layout import Life
from tests.support.arms import over_optimizers
from tests.support.asynchronous import GROWN, build, manual
from tests.support.ranks import Ranks
from tests.support.training import Shape, assert_same_bits, everything, set_gradients

SIXTEEN: list[Shape] = [(8, 8)] * 12 + [(16, 8)] * 8 + [(5,), (3,)]
"""Matrices that can be shared out evenly among up to four ranks, and vectors."""
STEPS = GROWN + 10
RUNTIMES = {
    "scheduled": RuntimeConfig(),
    "sync": RuntimeConfig(refresh="sync"),
    "eigh": RuntimeConfig(start="eigh", refresh_method="eigh"),
}
over_runtimes = pytest.mark.parametrize("runtime", RUNTIMES.values(), ids=RUNTIMES)


def alone(name: str, runtime: RuntimeConfig, shapes: list[Shape], **options: Any) -> Any:
    """The optimizer of one process after the same steps."""
    optimizer, workers = manual(build(name, runtime, shapes, **options))
    for step in range(STEPS):
        set_gradients(optimizer.param_groups[0]["params"], step)
        workers.run_all()
        optimizer.step()
    return optimizer


@over_runtimes
@over_optimizers
def test_several_ranks_do_what_one_does(name: str, runtime: RuntimeConfig) -> None:
    """Bit by bit, because what is multiplied together is the same."""
    shapes: list[Shape] = [(6, 4), (5,), (4, 4), (3, 2, 4), (6, 4), (7, 5)]
    ranks = Ranks(name, Topology.even(3, 3), runtime, shapes=shapes)
    assert ranks.train(range(STEPS)) == [None] * 3
    assert_same_bits(ranks.bits()[0], everything(alone(name, runtime, shapes)))


@pytest.mark.parametrize(
    ("more", "period"),
    [({}, 1), ({}, 3), ({"refresh": "sync"}, 1), ({"start": "adam"}, 3), ({"start": "eigh"}, 1)],
    ids=str,
)
def test_owners_turn_their_factors_and_all_install_the_same_bases(
    more: dict[str, Any], period: int
) -> None:
    shapes: list[Shape] = [(6, 4), (5,), (4, 4), (3, 2, 4), (6, 4), (7, 5)]
    runtime = RuntimeConfig(factors="rotated", **more)
    given = {"shapes": shapes, "precondition_frequency": period}
    ranks = Ranks("SOAP", Topology.even(3, 3), runtime, **given)
    assert ranks.train(range(STEPS)) == [None] * 3
    one = alone("SOAP", runtime, shapes, precondition_frequency=period)
    for bits in ranks.bits():
        assert_same_bits(bits, everything(one))


@over_runtimes
@pytest.mark.parametrize("size", [2, 4])
def test_work_and_memory_are_shared_out(size: int, runtime: RuntimeConfig) -> None:
    ranks = Ranks("SOAP", Topology.even(size, size), runtime, shapes=SIXTEEN)
    assert ranks.train(range(STEPS)) == [None] * size
    whole = alone("SOAP", runtime, SIXTEEN).stats()
    mine = [optimizer.stats() for optimizer in ranks.optimizers]
    # What is in flight at the end is in nobody's counters.
    assert sum(stats.factor_bytes for stats in mine) == whole.factor_bytes > 0
    assert sum(stats.refresh_cost for stats in mine) == whole.refresh_cost > 0
    assert sum(stats.refreshes for stats in mine) == whole.refreshes
    for stats in mine:
        assert stats.factor_bytes <= 1.1 / size * whole.factor_bytes
        assert stats.refresh_cost <= 1.1 / size * whole.refresh_cost
        assert stats.installs == whole.installs, "every rank installs everything"
        assert (stats.network.ranks, stats.network.owned_units) == (size, 20 // size)
    assert [stats.network.rank for stats in mine] == list(range(size))


def test_factors_are_with_their_owner_only() -> None:
    ranks = Ranks("SOAP", Topology.even(4, 2), shapes=SIXTEEN)
    ranks.train(range(2))
    for optimizer in ranks.optimizers:
        extents = optimizer._engine._all()
        kept = sum(tile.kept for extent in extents for tile in extent.tiles)
        assert kept == 5 + 2, "five matrices, and the vectors, which have no factors"
        for extent in extents:
            blocks = sum(tile.plan.blocks for tile in extent.tiles if tile.kept)
            if extent.rule.has_bases:
                assert extent.cells[Life.SUM].layout.blocks == blocks == extent.kept_blocks
                assert extent.cells[Life.BASIS].layout.blocks == extent.blocks


def test_a_new_basis_crosses_the_slow_link_once_per_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two nodes of two ranks: the bytes are those of the formula, and there are no others."""
    topology = Topology.even(4, 2)
    expected: Counter[Link] = Counter()
    published = []
    real = Coherence.publish

    def publish(self: Coherence, number: int, subject: str, note: Any, tensors: Any) -> None:
        nbytes = sum(tensor.nbytes for tensor in tensors if tensor is not None)
        expected.update(sent_bytes(nbytes, topology, self._post.rank))
        published.append((number, subject))
        real(self, number, subject, note, tensors)

    monkeypatch.setattr(Coherence, "publish", publish)
    ranks = Ranks("SOAP", topology, shapes=SIXTEEN)
    ranks.train(range(STEPS))
    networks = [optimizer.stats().network for optimizer in ranks.optimizers]
    for link in Link:
        sent = sum(network.links[link.value].sent_bytes for network in networks)
        received = sum(network.links[link.value].received_bytes for network in networks)
        assert sent == received == expected[link] > 0
    refreshes = len(published)
    assert len(set(published)) == refreshes, "no result travels twice"
    messages = sum(network.links["inter"].sent_messages for network in networks)
    assert messages == refreshes, "one other node"


def test_nothing_travels_in_steps_without_a_new_version() -> None:
    """A period of 100 after the young steps."""
    ranks = Ranks("SOAP", Topology.even(2, 2), shapes=SIXTEEN, precondition_frequency=100)
    ranks.train(range(GROWN))
    before = [optimizer.stats().network.links for optimizer in ranks.optimizers]
    ranks.train(range(GROWN, GROWN + 4))
    entries = ranks.optimizers[0].state.values()
    assert max(float(mine["version"]) for mine in entries if "version" in mine) < GROWN
    assert [optimizer.stats().network.links for optimizer in ranks.optimizers] == before


def test_a_wait_is_counted_by_rank_link_and_cause() -> None:
    """Rank 1 has a slow worker: the others wait for it at the bound."""
    ranks = Ranks("SOAP", Topology.even(2, 1), shapes=[(6, 4)] * 2)
    ranks.train(range(GROWN + 8))
    waits = [optimizer.stats().network.waits for optimizer in ranks.optimizers]
    for rank, mine in enumerate(waits):
        for waited in mine:
            assert waited.rank == 1 - rank
            assert waited.link == "inter"
            assert waited.cause in ("basis", "delivery")
            assert waited.count > 0
            assert waited.seconds >= 0


def test_credentials_are_those_of_the_training() -> None:
    """What changes no result, each rank may have its own of."""
    one = Ranks("SOAP", Topology.even(1, 1), RuntimeConfig(workers=1, trace=None))
    other = Ranks("SOAP", Topology.even(1, 1), RuntimeConfig(workers=2, host_budget="1GiB"))
    third = Ranks("SOAP", Topology.even(1, 1), RuntimeConfig(staleness=3))
    fourth = Ranks("SOAP", Topology.even(1, 1), shapes=[(6, 4), (4, 6)])
    fifth = Ranks("SOAP", Topology.even(1, 1), precondition_frequency=7)
    for ranks in (one, other, third, fourth, fifth):
        ranks.train(range(1))
    (same,) = one.credentials
    assert other.credentials == [same]
    for ranks in (third, fourth, fifth):
        assert ranks.credentials != [same]


def test_parameters_that_join_later_leave_the_others_where_they_are() -> None:
    ranks = Ranks("SOAP", Topology.even(2, 2), shapes=[(6, 4)] * 6)
    late = [(optimizer.param_groups[0]["params"][-1]) for optimizer in ranks.optimizers]
    for parameter in late:
        parameter.requires_grad_(False)

    def train(rank: int, steps: range, *, frozen: bool) -> None:
        optimizer = ranks.optimizers[rank]
        params = optimizer.param_groups[0]["params"]
        for step in steps:
            set_gradients(params, step)
            if frozen:
                params[-1].grad = None
            optimizer.step()

    ranks.on_all(lambda rank: train(rank, range(4), frozen=True))
    owners = [dict(optimizer._engine._peers._owners) for optimizer in ranks.optimizers]
    assert owners[0] == owners[1]
    assert len(owners[0]) == 5
    for parameter in late:
        parameter.requires_grad_(True)
    ranks.on_all(lambda rank: train(rank, range(4, STEPS), frozen=False))
    for before, optimizer in zip(owners, ranks.optimizers, strict=True):
        after = optimizer._engine._peers._owners
        assert before.items() <= after.items()
        assert sorted(Counter(after.values()).values()) == [3, 3]
    first, second = ranks.bits()
    assert_same_bits(second, first)


def test_frozen_parameters_with_a_gradient_have_an_owner_too() -> None:
    ranks = Ranks("SOAP", Topology.even(2, 2), shapes=[(6, 4)] * 3)
    for optimizer in ranks.optimizers:
        optimizer.param_groups[0]["params"][1].requires_grad_(False)
    assert ranks.train(range(6)) == [None, None]
    first, second = ranks.bits()
    assert_same_bits(second, first)


def test_a_clock_decides_nothing_here() -> None:
    ranks = Ranks("SOAP", Topology.even(2, 2), precondition_frequency="auto")
    for error in ranks.train(range(1)):
        assert isinstance(error, ConfigError)


def test_a_step_that_is_refused_is_refused_everywhere() -> None:
    ranks = Ranks("SOAP", Topology.even(2, 2), RuntimeConfig(nonfinite="skip"))
    ranks.train(range(3))
    ranks.train([3], scale=float("inf"))
    ranks.train(range(4, GROWN))
    assert [optimizer.stats().skipped_steps for optimizer in ranks.optimizers] == [1, 1]
    first, second = ranks.bits()
    assert_same_bits(second, first)
    assert all(torch.isfinite(value).all() for value in first.values())
