"""State on lower tiers is saved and loaded piece by piece, and saved as it was when asked for."""

import copy
import gc
import io
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from asteria import RuntimeConfig, StoreError
from asteria.optim.optimizer import SecondOrderOptimizer
from asteria.runtime import halves
from asteria.store import sources
from asteria.store.buffers import host_memory
from asteria.store.cell import Home
from asteria.store.distant import Distant
from tests.support.arms import OPTIMIZERS
from tests.support.asynchronous import GROWN
from tests.support.tiers import (
    ARRANGEMENTS,
    CheckedTier,
    arranged,
    homes,
    limit_extents,
)
from tests.support.training import Bits, assert_same_bits, everything, parameters, train

EXTENT_BYTES = 6 * 4 * 16 * 16 * 2
"""Two matrices of SOAP."""
SHAPES = [(16, 16)] * 12 + [(5,)]
SAVED = GROWN + 4
STEPS = SAVED + 8

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
over_formats = pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])


class Meter:
    """Host memory for values of distant tensors, counted while anybody has it."""

    def __init__(self) -> None:
        self.now_bytes = self.peak_bytes = 0

    def __call__(self, nbytes: int) -> torch.Tensor:
        memory = host_memory(nbytes)
        self.now_bytes += nbytes
        self.peak_bytes = max(self.peak_bytes, self.now_bytes)
        weakref.finalize(memory.untyped_storage(), self._freed, nbytes)
        return memory

    def _freed(self, nbytes: int) -> None:
        self.now_bytes -= nbytes


@pytest.fixture(autouse=True)
def meter(monkeypatch: pytest.MonkeyPatch) -> Meter:
    """Small extents, no tensor too small for a slot, and nothing kept for the next one."""
    limit_extents(monkeypatch, EXTENT_BYTES)
    monkeypatch.setattr(sources, "_LEAST_SLOT_BYTES", 512)
    monkeypatch.setattr(sources, "_RECENT_BYTES", 0)
    made = Meter()
    for module in (sources, halves):
        monkeypatch.setattr(module, "host_memory", made)
    return made


class Run:
    """A model and its optimizer, whose state is somewhere."""

    def __init__(
        self,
        name: str = "SOAP",
        place: str = "disk",
        runtime: RuntimeConfig | None = None,
        **options: bool,
    ) -> None:
        self.model = nn.ParameterList(parameters(SHAPES))
        self.optimizer: SecondOrderOptimizer = OPTIMIZERS[name](
            self.model.parameters(), precondition_frequency=3, shampoo_beta=0.5, runtime=runtime
        )
        self.stores = arranged(self.optimizer, ARRANGEMENTS[place])
        self.options = StateDictOptions(**options)

    def train(self, first: int, last: int) -> None:
        train(self.optimizer, range(first, last))

    def state(self) -> dict[str, Any]:
        found = get_optimizer_state_dict(self.model, self.optimizer, options=self.options)
        return {"optimizer": found}

    def load(self, folder: Path) -> None:
        """The checkpoint in ``folder``, by way of its own state."""
        state = self.state()
        dcp.load(state, checkpoint_id=folder, no_dist=True)
        given = state["optimizer"]
        set_optimizer_state_dict(self.model, self.optimizer, given, options=self.options)

    def bits(self) -> Bits:
        state = self.optimizer.state_dict()["state"]
        flat = {f"{i}.{key}": t.clone() for i, e in state.items() for key, t in e.items()}
        return everything(self.optimizer) | flat

    @property
    def state_bytes(self) -> int:
        return sum(cell.nbytes for e in self.optimizer._engine._all() for cell in e.cells.values())

    @property
    def largest_bytes(self) -> int:
        """Of a cell."""
        return max(c.nbytes for e in self.optimizer._engine._all() for c in e.cells.values())


STREAMED: list[tuple[str, bool, str]] = [
    *((name, flat, "full") for name in OPTIMIZERS for flat in (False, True)),
    ("SOAP", False, "packed"),
    ("KLShampoo", True, "packed"),
]


@pytest.mark.parametrize(("name", "flat", "factors"), STREAMED)
def test_saving_and_loading_take_a_cell_and_a_tensor_at_a_time(
    name: str, flat: bool, factors: Any, tmp_path: Path, meter: Meter
) -> None:
    runtime = RuntimeConfig(factors=factors)
    whole, resumed = (
        Run(name, runtime=runtime, flatten_optimizer_state_dict=flat) for _ in range(2)
    )
    whole.train(0, SAVED)
    resumed.train(0, 3)
    assert homes(whole.optimizer) == homes(resumed.optimizer) == {Home.NVME}
    state = whole.state()
    assert meter.peak_bytes == 0, "nothing is read before it is written"
    dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    most = whole.largest_bytes + 2 * 4 * 16 * 16
    assert 0 < meter.peak_bytes <= most < whole.state_bytes / (8 if factors == "packed" else 10)
    meter.peak_bytes = 0
    slots = len(resumed.stores.tier.slots)
    resumed.load(tmp_path)
    assert 0 < meter.peak_bytes <= most
    gc.collect()
    assert len(resumed.stores.tier.slots) <= slots, "what was read in between is gone"
    with torch.no_grad():
        for mine, theirs in zip(resumed.model, whole.model, strict=True):
            mine.copy_(theirs)
    assert_same_bits(resumed.bits(), whole.bits())
    for run in (whole, resumed):
        run.train(SAVED, STEPS)
    assert_same_bits(resumed.bits(), whole.bits())


def test_a_state_dict_takes_no_memory_for_what_is_on_disk(meter: Meter) -> None:
    run = Run()
    run.train(0, SAVED)
    state = copy.deepcopy(run.optimizer.state_dict())
    distant = {key for entries in state["state"].values() for key, t in entries.items() if _away(t)}
    assert distant >= {"exp_avg", "exp_avg_sq", "basis_0", "factor_1"}
    assert meter.peak_bytes == 0


def _away(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, Distant) and not tensor.is_held


PLACES = ["disk", "some on disk", "pinned", "all three", "disk behind a device"]


@pytest.mark.parametrize("place", PLACES)
def test_what_is_away_is_saved_as_it_was_when_it_was_asked_for(place: str) -> None:
    run, twin = Run(place=place), Run(place=place)
    for each in (run, twin):
        each.train(0, SAVED)
    state = run.optimizer.state_dict()["state"]
    expected = twin.optimizer.state_dict()["state"]
    away = {(i, key) for i, e in state.items() for key, t in e.items() if _away(t)}
    assert len({i for i, _ in away}) == len(SHAPES)
    run.train(SAVED, STEPS)
    for i, key in away:
        assert torch.equal(state[i][key], expected[i][key]), key


@pytest.mark.parametrize("place", ["pinned", "disk behind a device"])
def test_what_nobody_has_any_more_is_not_read(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(place=place)
    run.train(0, SAVED)
    run.optimizer.state_dict()
    state = run.optimizer.state_dict()["state"][0]["exp_avg"]
    reads = []
    values = state._origin
    monkeypatch.setattr(type(values), "hold", lambda self: reads.append(self))
    run.train(SAVED, SAVED + 1)
    assert reads == ([values] if place == "pinned" else [])


def test_a_full_disk_gets_back_what_state_dicts_have_of_it() -> None:
    run, twin = Run(), Run()
    run.train(0, SAVED)
    twin.train(0, SAVED)
    kept = twin.bits()
    twin.stores.tier.most_bytes = 0
    twin.train(SAVED, STEPS)
    run.stores.tier.budget_bytes = twin.stores.tier.most_bytes
    state = run.optimizer.state_dict()["state"]
    assert _away(state[0]["exp_avg"])
    run.train(SAVED, STEPS)
    assert not _away(state[0]["exp_avg"])
    assert torch.equal(state[0]["exp_avg"], kept["0.exp_avg"])
    assert_same_bits(run.bits(), twin.bits())


def test_without_room_on_the_disk_loading_takes_memory(tmp_path: Path) -> None:
    whole, resumed = Run(), Run()
    for each in (whole, resumed):
        each.train(0, SAVED)
    dcp.save(whole.state(), checkpoint_id=tmp_path, no_dist=True)
    tier, workers = resumed.stores.tier, resumed.stores.workers
    for jobs in (workers.submitted, workers.done, workers.waited_for, workers.discarded):
        jobs.clear()  # whose results are on the disk
    tier.budget_bytes = tier.used_bytes + 6 * resumed.largest_bytes
    resumed.load(tmp_path)
    assert_same_bits(resumed.bits(), whole.bits())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "nvme"
    place.mkdir()
    return place


def on_a_disk(folder: Path) -> SecondOrderOptimizer:
    runtime = RuntimeConfig(host_budget=0, nvme_path=folder)
    optimizer = OPTIMIZERS["SOAP"](parameters(SHAPES), shampoo_beta=0.5, runtime=runtime)
    train(optimizer, range(SAVED))
    return optimizer


def test_a_state_dict_outlives_its_optimizer(folder: Path) -> None:
    optimizer = on_a_disk(folder)
    state, expected = optimizer.state_dict(), copy.deepcopy(everything(optimizer))
    optimizer.close()
    del optimizer
    gc.collect()
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    found = torch.load(file, weights_only=True)["state"]
    for key in ("0.exp_avg", "3.factor_0", "7.basis_1"):
        index, name = key.split(".")
        assert torch.equal(found[int(index)][name], expected[key])
        assert torch.equal(state["state"][int(index)][name], expected[key])


def test_the_folder_goes_with_the_last_of_optimizer_and_state_dicts(folder: Path) -> None:
    optimizer = on_a_disk(folder)
    state = optimizer.state_dict()
    optimizer.close()
    del optimizer
    gc.collect()
    assert list(folder.iterdir())
    del state
    for thread in threading.enumerate():
        if thread.name == "asteria close":
            thread.join()
    assert not list(folder.iterdir())


def test_what_a_disk_has_lost_is_an_error_and_no_wrong_number(folder: Path, tmp_path: Path) -> None:
    optimizer = on_a_disk(folder)
    optimizer._engine._residence._doors[torch.device("cpu")].flush()
    state = optimizer.state_dict()
    for file in folder.rglob("*"):
        if file.is_file() and file.name.isdecimal():
            content = bytearray(file.read_bytes())
            content[10] ^= 1
            file.write_bytes(content)
    with pytest.raises(StoreError, match="checksum"):
        torch.save(state, io.BytesIO())
    optimizer.close()


@pytest.mark.parametrize("stager", ["default", "writer"])
def test_asynchronous_saves_have_the_values_of_their_step(stager: str, tmp_path: Path) -> None:
    """Their stagers, of which older versions have the second, copy what is in memory."""
    where: dict[str, Any] = {"checkpoint_id": tmp_path / "saved"}
    if stager == "writer":
        where = {"storage_writer": dcp.FileSystemWriter(tmp_path / "saved")}
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        run, still, resumed = (Run() for _ in range(3))
        for each in (run, still):
            each.train(0, SAVED)
        pending: Any = dcp.async_save(run.state(), **where)
        run.train(SAVED, STEPS)
        pending.result()
        resumed.train(0, 2)
        resumed.load(tmp_path / "saved")
        with torch.no_grad():
            for mine, theirs in zip(resumed.model, still.model, strict=True):
                mine.copy_(theirs)
        assert_same_bits(resumed.bits(), still.bits())
    finally:
        dist.destroy_process_group()


def test_the_stand_in_counts_all_that_is_read(meter: Meter) -> None:
    run = Run()
    run.train(0, 3)
    assert isinstance(run.stores.tier, CheckedTier)
    read = [t.clone() for e in run.optimizer.state_dict()["state"].values() for t in e.values()]
    assert read
    assert meter.peak_bytes > 0
