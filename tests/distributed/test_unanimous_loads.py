"""A load that fails on one rank fails on all of them at once, and changes the state of none."""

import copy
from pathlib import Path
from typing import Any

import pytest

from asteria import CheckpointError, StoreFullError
from asteria.distributed.topology import Topology
from asteria.errors import CoherenceError
from asteria.runtime.consent import Consent
from tests.distributed.fans import Run, differing, whole
from tests.support.asynchronous import GROWN
from tests.support.processes import gather
from tests.support.ranks import Ranks
from tests.support.training import Shape, assert_same_bits

SHAPES: list[Shape] = [(6, 4), (5,), (7, 5)]
THREE = Topology.even(3, 3)


def broken(state: dict[str, Any]) -> dict[str, Any]:
    """What a disk has lost a tensor of."""
    spoilt = copy.deepcopy(state)
    del spoilt["state"][0]["exp_avg"]
    return spoilt


def loaded(ranks: Ranks, state: dict[str, Any], bad: int) -> list[Any]:
    """What is raised when all load ``state``, and rank ``bad`` a broken one."""

    def load(rank: int) -> None:
        given = broken(state) if rank == bad else copy.deepcopy(state)
        ranks.optimizers[rank].load_state_dict(given)

    return ranks.on_all(load)


@pytest.mark.parametrize("trained", [GROWN, 0], ids=["met", "new"])
def test_what_one_replica_cannot_load_none_does(trained: int) -> None:
    first = Ranks("SOAP", THREE, shapes=SHAPES)
    first.train(range(GROWN))
    for workers in first.workers:
        workers.run_all()
    state = first.on_all(
        lambda rank: copy.deepcopy(first.optimizers[rank].state_dict()) if rank == 0 else None
    )[0]
    ranks = Ranks("SOAP", THREE, shapes=SHAPES)
    ranks.train(range(trained))
    before = ranks.bits()
    errors = loaded(ranks, state, bad=1)
    assert all(isinstance(error, CheckpointError) for error in errors)
    assert "exp_avg" in str(errors[1])
    for other in (errors[0], errors[2]):
        assert "rank 1 could not, and says why; nothing was loaded on any rank" in str(other)
    for now, then in zip(ranks.bits(), before, strict=True):
        assert_same_bits(now, then)
    assert loaded(ranks, state, bad=-1) == [None] * 3
    assert ranks.train(range(GROWN, GROWN + 5)) == [None] * 3
    bits = ranks.bits()
    for other in bits[1:]:
        assert_same_bits(other, bits[0])


def test_state_that_one_replica_has_no_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The old state is gone then: none has one until all have loaded."""
    ranks = Ranks("SOAP", THREE, shapes=SHAPES)
    ranks.train(range(GROWN))
    for workers in ranks.workers:
        workers.run_all()
    state = ranks.on_all(
        lambda rank: copy.deepcopy(ranks.optimizers[rank].state_dict()) if rank == 0 else None
    )[0]

    def full(*_: Any) -> None:
        raise StoreFullError("no room")

    with monkeypatch.context() as patched:
        patched.setattr(ranks.optimizers[2]._engine, "admit", full)
        errors = loaded(ranks, state, bad=-1)
    assert isinstance(errors[2], StoreFullError)
    for error in errors[:2]:
        assert isinstance(error, CheckpointError)
        assert "rank 2 could not, and says why; no rank has a state until" in str(error)
    for error in ranks.train([GROWN]):
        assert isinstance(error, CheckpointError)
        assert "has no state" in str(error)
    assert loaded(ranks, state, bad=-1) == [None] * 3
    assert ranks.train(range(GROWN, GROWN + 5)) == [None] * 3
    bits = ranks.bits()
    for other in bits[1:]:
        assert_same_bits(other, bits[0])


def test_a_rank_that_has_told_tells_no_more() -> None:
    """What fails after the last vote, or in one, is nobody's to wait for."""
    votes: list[bool] = []

    def vote(failed: bool) -> list[int]:
        votes.append(failed)
        return [3] if len(votes) == 2 else []

    def load(error: Exception | None, *, settled: int) -> None:
        with Consent(vote) as consent:
            for _ in range(settled):
                consent.settle()
            if error is not None:
                raise error

    with pytest.raises(CheckpointError, match="rank 3 could not"):
        load(None, settled=2)
    assert votes == [False, False]
    load(None, settled=2)
    with pytest.raises(ValueError, match="a hook"):
        load(ValueError("a hook"), settled=2)
    with pytest.raises(CoherenceError, match="gone"):
        load(CoherenceError("a rank is gone"), settled=1)
    assert votes == [False] * 7
    with pytest.raises(ValueError, match="a file"):
        load(ValueError("a file"), settled=0)
    assert votes == [False] * 7 + [True]


SAVED, STEPS = 4, 8


def of_shards(rank: int, runtime: dict[str, Any]) -> dict[str, Any]:
    run = Run("SOAP", (2,), runtime=runtime)
    run.train(range(SAVED))
    state = copy.deepcopy(run.optimizer.state_dict())
    found: dict[str, Any] = {}
    try:
        run.optimizer.load_state_dict(broken(state) if rank == 1 else state)
    except CheckpointError as error:
        found["told"] = str(error)
    run.train(range(SAVED, STEPS))
    found["weights"] = run.parts()
    return found


@pytest.mark.parametrize("group", [None, "alone"])
def test_what_one_rank_of_shards_cannot_load_none_does(group: str | None, tmp_path: Path) -> None:
    wanted = whole("SOAP", STEPS)
    first, second = gather(2, tmp_path / "store", of_shards, {"process_group": group})
    assert "rank 1 could not, and says why; nothing was loaded" in first["told"]
    assert "exp_avg" in second["told"]
    for found in (first, second):
        assert not differing(found["weights"], wanted)
