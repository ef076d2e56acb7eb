"""What travels of sharded parameters is counted, bounded, and as much as the formula says."""

from collections import Counter
from typing import Any

import pytest

from asteria.distributed.sharded_exchange import Exchange, Transit
from asteria.distributed.sharded_layout import Box
from asteria.runtime.pieces import gathered_bytes
from asteria.telemetry.counters import LinkTraffic, Network
from tests.distributed.fans import Run, differing, whole
from tests.support.processes import gather

STEPS, MORE = 2, 3
NODE = 2
"""Ranks of an emulated node."""
BOUND = 1000
"""Bytes of a message, where that is asked for; some parameters are larger."""
STEPS_IN_PIECES = 8


def elements(box: Box) -> int:
    size = 1
    for part in box:
        size *= part.stop - part.start
    return size


def expected(run: Run) -> tuple[Counter[tuple[int, int]], Counter[tuple[int, int]]]:
    """Bytes of a step by (source, target): of gradients, and of updates, in float32."""
    gradients: Counter[tuple[int, int]] = Counter()
    updates: Counter[tuple[int, int]] = Counter()
    for record in run.optimizer._records.values():
        sharding = record.sharding
        layout, owner = sharding.layout, sharding.owner
        for rank, box in enumerate(layout.boxes):
            if rank != owner and (nbytes := 4 * elements(box)):
                updates[owner, rank] += nbytes
                if layout.replicas[rank] == layout.replicas[owner]:
                    gradients[rank, owner] += nbytes
    return gradients, updates


def by_link(run: Run, rank: int, steps: int) -> dict[str, LinkTraffic]:
    """What this rank must have sent and received: a message for each pair, one each way."""
    sums: dict[str, Counter[str]] = {"intra": Counter(), "inter": Counter()}
    for table in expected(run):
        for (source, target), nbytes in table.items():
            link = sums["intra" if source // NODE == target // NODE else "inter"]
            for end, way in ((source, "sent"), (target, "received")):
                if end == rank:
                    link[f"{way}_bytes"] += steps * nbytes
                    link[f"{way}_messages"] += steps
    return {name: LinkTraffic(**counts) for name, counts in sums.items()}


def less(after: LinkTraffic, before: LinkTraffic) -> LinkTraffic:
    names = LinkTraffic.__dataclass_fields__
    return LinkTraffic(**{name: getattr(after, name) - getattr(before, name) for name in names})


def counted(rank: int) -> dict[str, Any]:
    run = Run("SOAP", (2, 2), runtime={"node_size": NODE})
    run.train(range(STEPS))
    before = run.optimizer.stats().network
    run.train(range(STEPS, STEPS + MORE))
    after: Network = run.optimizer.stats().network
    found = {link: less(after.shard_links[link], one) for link, one in before.shard_links.items()}
    run.optimizer.state_dict()["state"][0]["exp_avg"].clone()
    return {
        "found": found,
        "wanted": by_link(run, rank, MORE),
        "waits": {(one.rank, one.link, one.cause): one.count for one in after.waits},
        "replicas": {one.sent_bytes for one in after.links.values()},
        "read": run.optimizer.stats().network.shard_links != after.shard_links,
        "local": Run("SOAP", (4,), runtime={"shards": "local"}).optimizer.stats().network,
        "pieces": in_pieces(),
    }


def in_pieces() -> dict[str, Any]:
    """A run whose messages are small, and what they took."""
    sizes: list[tuple[int, int]] = []
    real = Exchange.send

    def send(self: Exchange, kinds: Any, parcels: Any, *rest: Any) -> Transit:
        transit = real(self, kinds, parcels, *rest)
        sizes.append((transit.nbytes, len({parcel.shape for parcel in parcels})))
        return transit

    run = Run("SOAP", (4,))
    run.optimizer._engine._sharded.wholes.message_bytes = BOUND
    run.train(range(1))
    Exchange.send = send  # type: ignore[method-assign]
    try:
        run.train(range(1, STEPS_IN_PIECES))
    finally:
        Exchange.send = real  # type: ignore[method-assign]
    records = run.optimizer._records.values()
    return {
        "weights": run.parts(),
        "messages": len(sizes) / (STEPS_IN_PIECES - 1),
        "largest": max(nbytes for nbytes, _ in sizes),
        "peak": run.optimizer.stats().network.gathered_peak_bytes,
        "planned": gathered_bytes(records, BOUND),
        "taken": run.optimizer._engine._residence.gathered_bytes,
        "alone": 2 * 4 * max(record.shape.numel() for record in records),
    }


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return list(gather(4, tmp_path_factory.mktemp("traffic") / "store", counted))


def test_bytes_and_messages_are_those_of_the_formula(results: list[dict[str, Any]]) -> None:
    """Two nodes that are replicas of two shards each."""
    total: Counter[str] = Counter()
    for found in results:
        assert found["found"] == found["wanted"]
        for link, one in found["found"].items():
            total[f"{link} sent"] += one.sent_bytes
            total[f"{link} received"] += one.received_bytes
        assert found["replicas"] <= {0}, "no replicated parameters"
    assert total["intra sent"] == total["intra received"] > 0
    assert total["inter sent"] == total["inter received"] > 0


def test_waits_are_counted_by_cause(results: list[dict[str, Any]]) -> None:
    steps = STEPS + MORE
    for found in results:
        waits = {key: count for key, count in found["waits"].items() if key[0] == -1}
        assert waits[-1, "inter", "gradients"] == waits[-1, "inter", "updates"] == steps
        assert waits[-1, "inter", "decision"] == 2 * steps
        assert found["read"], "state that is read is counted, too"


def test_shards_of_their_own_send_nothing(results: list[dict[str, Any]]) -> None:
    for found in results:
        assert found["local"].shard_links == {}
        assert found["local"].gathered_peak_bytes == 0


def test_messages_are_bounded_and_the_bits_are_the_same(results: list[dict[str, Any]]) -> None:
    wanted = whole("SOAP", STEPS_IN_PIECES)
    for found in results:
        pieces = found["pieces"]
        assert not differing(pieces["weights"], wanted)
        assert pieces["messages"] > 4
        assert pieces["largest"] <= max(2 * BOUND, pieces["alone"])
        assert 0 < pieces["peak"] <= pieces["planned"] == pieces["taken"]
