"""Ranks that share the refreshes have the same bits, whatever is fast and slow."""

import pytest

from asteria import RuntimeConfig
from asteria.distributed.topology import Topology
from tests.support.arms import over_optimizers
from tests.support.ranks import Ranks
from tests.support.training import assert_same_bits

RUNTIMES = {
    "scheduled": RuntimeConfig(),
    "sync": RuntimeConfig(refresh="sync"),
    "eigh": RuntimeConfig(start="eigh", refresh_method="eigh"),
    "adam": RuntimeConfig(start="adam"),
    "ready": RuntimeConfig(install="ready"),
    "device": RuntimeConfig(refresh_on="device"),
}
SHAPES = [(6, 4), (5,), (4, 4), (3, 2, 4), (8, 4), (6, 4), (7, 5)]
STEPS = 40


@pytest.mark.parametrize("runtime", RUNTIMES.values(), ids=RUNTIMES)
@over_optimizers
def test_all_ranks_have_the_same_bits(name: str, runtime: RuntimeConfig) -> None:
    ranks = Ranks(name, Topology.even(4, 2), runtime, shapes=SHAPES)
    assert ranks.train(range(STEPS)) == [None] * 4
    first, *others = ranks.bits()
    for other in others:
        assert_same_bits(other, first)
    networks = [optimizer.stats().network for optimizer in ranks.optimizers]
    assert all(network.owned_units for network in networks)
    assert sum(network.owned_units for network in networks) == 6
