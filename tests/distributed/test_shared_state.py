"""State whose factors several ranks keep is whole for who asks, and goes to any number of them."""

import copy
import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import asteria
from asteria import CheckpointError, CoherenceError, RuntimeConfig
from asteria.distributed.topology import Topology
from tests.support.arms import over_optimizers
from tests.support.asynchronous import GROWN, build, manual
from tests.support.ranks import Ranks
from tests.support.training import (
    Shape,
    assert_same_bits,
    everything,
    set_gradients,
    train,
    weights,
)

SHAPES: list[Shape] = [(6, 4), (5,), (4, 4), (3, 2, 4), (6, 4), (7, 5)]
SAVED, STEPS = GROWN + 4, GROWN + 12
PAIR, FOUR = Topology.even(2, 2), Topology.even(4, 2)


def alone(name: str, steps: range, start: Any = None, **options: Any) -> Any:
    """One process that takes these steps, from a checkpoint if there is one."""
    optimizer, workers = manual(build(name, shapes=SHAPES, **options))
    params = optimizer.param_groups[0]["params"]
    if start is not None:
        load(optimizer, start)
    for step in steps:
        set_gradients(params, step)
        workers.run_all()
        optimizer.step()
    return optimizer


def save(optimizer: Any) -> bytes:
    """A checkpoint as one process writes it, by the recipe of every tutorial."""
    file = io.BytesIO()
    params = [p.detach() for p in optimizer.param_groups[0]["params"]]
    torch.save({"optimizer": optimizer.state_dict(), "params": params}, file)
    return file.getvalue()


def load(optimizer: Any, checkpoint: bytes) -> None:
    saved = torch.load(io.BytesIO(checkpoint), weights_only=True)
    with torch.no_grad():
        for p, value in zip(optimizer.param_groups[0]["params"], saved["params"], strict=True):
            p.copy_(value)
    optimizer.load_state_dict(saved["optimizer"])


def trained(name: str, topology: Topology, **options: Any) -> Ranks:
    ranks = Ranks(name, topology, shapes=SHAPES, **options)
    assert ranks.train(range(SAVED)) == [None] * topology.size
    return ranks


def by_the_first(ranks: Ranks, work: Callable[[], Any]) -> Any:
    """``work()`` on rank 0, while the workers of all go on and nobody trains."""
    return ranks.on_all(lambda rank: work() if rank == 0 else ranks.workers[rank].run_all())[0]


@over_optimizers
def test_one_rank_saves_while_the_others_do_nothing(name: str) -> None:
    """And one process, or another number of ranks, resumes to the same bits."""
    ranks = trained(name, PAIR)
    checkpoint = by_the_first(ranks, lambda: save(ranks.optimizers[0]))
    whole = everything(alone(name, range(STEPS)))
    assert_same_bits(everything(alone(name, range(SAVED, STEPS), checkpoint)), whole)
    for topology in (PAIR, FOUR):
        resumed = Ranks(name, topology, shapes=SHAPES)
        loaded = resumed.on_all(lambda rank, r=resumed: load(r.optimizers[rank], checkpoint))  # type: ignore[misc]
        assert loaded == [None] * topology.size
        assert resumed.train(range(SAVED, STEPS)) == [None] * topology.size
        for bits in resumed.bits():
            assert_same_bits(bits, whole)
    ranks.train(range(SAVED, STEPS))
    for bits in ranks.bits():  # saving has changed nothing
        assert_same_bits(bits, whole)


@over_optimizers
def test_packed_factors_of_other_ranks_are_shown_in_full(name: str) -> None:
    """Half of them travels; one process resumes to the same bits, in either form."""
    options: dict[str, Any] = {"runtime": RuntimeConfig(factors="packed")}
    ranks = trained(name, PAIR, **options)
    checkpoint = by_the_first(ranks, lambda: save(ranks.optimizers[0]))
    whole = everything(alone(name, range(STEPS), **options))
    assert_same_bits(everything(alone(name, range(SAVED, STEPS), checkpoint, **options)), whole)
    shown = everything(alone(name, range(0), checkpoint))
    assert_same_bits(shown, everything(alone(name, range(0), checkpoint, **options)))
    ranks.train(range(SAVED, STEPS))
    for bits in ranks.bits():
        assert_same_bits(bits, whole)
    kept = [each.stats().factor_bytes for each in ranks.optimizers]
    assert sum(kept) == alone(name, range(1), **options).stats().factor_bytes


@over_optimizers
def test_what_one_process_saved_is_taken_up_by_several(name: str) -> None:
    checkpoint = save(alone(name, range(SAVED)))
    whole = everything(alone(name, range(STEPS)))
    resumed = Ranks(name, FOUR, shapes=SHAPES)
    resumed.on_all(lambda rank: load(resumed.optimizers[rank], checkpoint))
    resumed.train(range(SAVED, STEPS))
    for bits in resumed.bits():
        assert_same_bits(bits, whole)


def test_every_rank_may_save_at_the_same_time() -> None:
    ranks = trained("SOAP", FOUR)
    for workers in ranks.workers:
        workers.run_all()
    saved = ranks.on_all(lambda rank: save(ranks.optimizers[rank]))
    assert all(isinstance(one, bytes) for one in saved)
    loads = [torch.load(io.BytesIO(one), weights_only=True) for one in saved]
    first = loads[0]["optimizer"]["state"]
    for other in loads[1:]:
        for index, entries in other["optimizer"]["state"].items():
            assert_same_bits(entries, first[index])


def test_a_state_dict_is_read_when_it_is_written() -> None:
    """Asking for it moves no factor; writing it moves those of the other rank once."""
    ranks = trained("SOAP", PAIR)
    first = ranks.optimizers[0]

    def received() -> int:
        links = first.stats().network.links.values()
        return sum(link.received_messages for link in links)

    ranks.on_all(lambda rank: ranks.workers[rank].run_all())
    before = received()
    state = by_the_first(ranks, first.state_dict)
    assert received() == before
    by_the_first(ranks, lambda: torch.save(state, io.BytesIO()))
    others = sum(
        sum(tile.plan.shape.factored)
        for extent in first._engine._all()
        for tile in extent.tiles
        if not tile.kept
    )
    assert received() == before + others > before


def test_a_state_dict_that_was_not_read_before_the_next_step() -> None:
    ranks = trained("SOAP", PAIR)
    state = by_the_first(ranks, ranks.optimizers[0].state_dict)
    copied = by_the_first(ranks, lambda: copy.deepcopy(state))
    ranks.train([SAVED])
    error = by_the_first(ranks, lambda: torch.save(state, io.BytesIO()))
    assert isinstance(error, CheckpointError)
    assert f"of step {SAVED - 1}" in str(error)
    torch.save(copied, io.BytesIO())


def test_ranks_at_different_steps_do_not_mix() -> None:
    ranks = trained("SOAP", PAIR)

    def work(rank: int) -> None:
        if rank == 1:
            set_gradients(ranks.optimizers[1].param_groups[0]["params"], SAVED)
            ranks.optimizers[1].step()

    ranks.on_all(lambda rank: ranks.workers[rank].run_all())
    ranks.on_all(work)
    error = by_the_first(ranks, lambda: save(ranks.optimizers[0]))
    assert isinstance(error, CheckpointError)
    assert "was asked of rank 1: it has taken" in str(error)


def test_a_rank_that_is_gone_cannot_be_asked() -> None:
    ranks = trained("SOAP", PAIR)
    ranks.network.lose(1)
    error = by_the_first(ranks, lambda: save(ranks.optimizers[0]))
    assert isinstance(error, CoherenceError)
    assert "rank 1 is gone" in str(error)


def test_state_that_was_touched_on_all_ranks_is_taken_up() -> None:
    """A parameter starts afresh; its factors stay with their owner."""
    ranks = trained("SOAP", PAIR)

    def touch(rank: int) -> None:
        optimizer = ranks.optimizers[rank]
        del optimizer.state[optimizer.param_groups[0]["params"][0]]

    ranks.on_all(touch)
    assert ranks.train(range(SAVED, STEPS)) == [None, None]
    first, second = ranks.bits()
    assert_same_bits(second, first)


@over_optimizers
def test_slim_checkpoints_on_several_ranks(name: str) -> None:
    """First bases that moments wait for are made by their owners, within the step."""
    checkpoint = asteria.slim(alone(name, range(SAVED)).state_dict())
    single, workers = manual(build(name, shapes=SHAPES))
    single.load_state_dict(copy.deepcopy(checkpoint))
    ranks = Ranks(name, PAIR, shapes=SHAPES)
    ranks.on_all(lambda rank: ranks.optimizers[rank].load_state_dict(copy.deepcopy(checkpoint)))
    for step in range(6):
        set_gradients(single.param_groups[0]["params"], step)
        single.step()
        workers.run_all()
    assert ranks.train(range(6)) == [None, None]
    for bits in ranks.bits():
        assert_same_bits(bits, everything(single))


@pytest.mark.parametrize("budget", ["8KiB", "1MiB"])
def test_tiers_on_several_ranks(budget: str, tmp_path: Path) -> None:
    """Each rank has what it keeps on a disk; the bits are those of a run in memory."""
    whole = alone("SOAP", range(STEPS))
    runtime = RuntimeConfig(nvme_path=tmp_path, host_budget=budget)
    ranks = Ranks("SOAP", PAIR, runtime, shapes=SHAPES)
    assert ranks.train(range(SAVED)) == [None, None]
    checkpoint = by_the_first(ranks, lambda: save(ranks.optimizers[0]))
    assert ranks.train(range(SAVED, STEPS)) == [None, None]
    for bits in ranks.bits():
        assert_same_bits(bits, everything(whole))
    resumed = alone("SOAP", range(SAVED, STEPS), checkpoint)
    assert_same_bits(
        weights(resumed.param_groups[0]["params"]), weights(whole.param_groups[0]["params"])
    )
    on_disk = [optimizer.stats().tier_peak_bytes["nvme"] for optimizer in ranks.optimizers]
    assert all(on_disk) or budget == "1MiB"


@pytest.mark.parametrize("refresh", ["sync", "async"])
def test_factors_that_turn_may_be_on_a_disk(refresh: Any, tmp_path: Path) -> None:
    """What is installed at the end of a step with others turns them, too."""
    runtime = RuntimeConfig(refresh=refresh, factors="rotated")
    given = {"shapes": SHAPES, "precondition_frequency": 2}
    whole = build("SOAP", runtime, **given)
    train(whole, range(STEPS))
    far = replace(runtime, nvme_path=tmp_path, host_budget="8KiB")
    ranks = Ranks("SOAP", PAIR, far, **given)
    assert ranks.train(range(STEPS)) == [None, None]
    for bits in ranks.bits():
        assert_same_bits(bits, everything(whole))
    assert all(o.stats().tier_peak_bytes["nvme"] for o in ranks.optimizers)
    whole.close()


def test_ranks_of_a_node_share_its_memory() -> None:
    """What is free is divided among them."""
    ranks = trained("SOAP", FOUR)
    assert [o._engine._residence.sharers for o in ranks.optimizers] == [2] * 4
