"""torch.distributed.checkpoint and its state-dict functions, in a group of one process.

Where these functions have limits of their own, AdamW is the measure: parameters that require a
gradient and never had one, and flattened full state dicts, are refused or taken as for AdamW.
"""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

import asteria
from asteria import RuntimeConfig
from tests.integrations.settings import build, network
from tests.support.arms import over_optimizers
from tests.support.training import assert_same_bits, everything, gradient, weights

PERIOD = 3
WINDOW = range(17, 17 + 2 * PERIOD)
"""Two periods, when nothing is young any more."""
SAVED = 20
"""Then refreshes are in flight."""
STEPS = WINDOW.stop + PERIOD

over_formats = pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])


@pytest.fixture(autouse=True, scope="module")
def group() -> Iterator[None]:
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


class Run:
    """A model and its optimizer, and the options by which their state is taken."""

    def __init__(
        self,
        name: str,
        model: Callable[[], nn.Module] = network,
        *,
        period: int = PERIOD,
        staleness: int = 2,
        factors: Any = "full",
        **options: Any,
    ) -> None:
        self.model = model()
        if name == "AdamW":
            self.optimizer: Any = torch.optim.AdamW(self.model.parameters())
        else:
            params = self.model.parameters()
            runtime = RuntimeConfig(staleness=staleness, factors=factors)
            self.optimizer = build(name, params, precondition_frequency=period, runtime=runtime)
        self.options = StateDictOptions(**options)

    def train(self, first: int, last: int) -> None:
        """Steps ``first`` to ``last``."""
        for step in range(first, last):
            self.optimizer.zero_grad()
            x = gradient((4, 6), torch.float32, step, 0)
            self.model(x).square().mean().backward()
            self.optimizer.step()

    def state(self) -> dict[str, Any]:
        """The optimizer's state by names of parameters."""
        return get_optimizer_state_dict(self.model, self.optimizer, options=self.options)

    def load(self, other: "Run", state: dict[str, Any]) -> None:
        """Take the weights of another run and this state."""
        self.model.load_state_dict(other.model.state_dict())
        set_optimizer_state_dict(self.model, self.optimizer, state, options=self.options)

    def bits(self) -> dict[str, torch.Tensor]:
        """All weights and all state."""
        return everything(self.optimizer)


def flights(run: Run) -> int:
    """Refreshes in flight."""
    return int(run.optimizer.stats().in_flight)


def read(saved: Path, run: Run) -> dict[str, Any]:
    """What is on disk of ``run``'s own state, which is the loader's template."""
    state = {"optimizer": run.state()}
    dcp.load(state, checkpoint_id=saved)
    return state["optimizer"]


@over_formats
@over_optimizers
def test_resumes_from_memory_to_the_same_bits(name: str, flat: bool) -> None:
    whole, resumed = (Run(name, flatten_optimizer_state_dict=flat) for _ in range(2))
    whole.train(0, SAVED)
    resumed.load(whole, copy.deepcopy(whole.state()))
    assert flights(resumed) == flights(whole) > 0
    for run in (whole, resumed):
        run.train(SAVED, STEPS)
    assert_same_bits(resumed.bits(), whole.bits())


@pytest.mark.parametrize("begun_steps", [0, 3], ids=["fresh", "running"])
@over_formats
@over_optimizers
def test_resumes_from_disk_to_the_same_bits(
    name: str, flat: bool, begun_steps: int, tmp_path: Path
) -> None:
    """Into a new optimizer, for which the loader makes state by a step, and into a used one."""
    whole, resumed = (Run(name, flatten_optimizer_state_dict=flat) for _ in range(2))
    whole.train(0, SAVED)
    dcp.save({"optimizer": whole.state()}, checkpoint_id=tmp_path)
    resumed.train(0, begun_steps)
    resumed.load(whole, read(tmp_path, resumed))
    for run in (whole, resumed):
        run.train(SAVED, STEPS)
    assert_same_bits(resumed.bits(), whole.bits())


@over_optimizers
def test_what_is_saved_asynchronously_is_the_state_of_that_step(name: str, tmp_path: Path) -> None:
    """Training goes on while the files are written."""
    whole, still, resumed = (Run(name) for _ in range(3))
    for run in (whole, still):
        run.train(0, SAVED)
    pending: Any = dcp.async_save({"optimizer": whole.state()}, checkpoint_id=tmp_path)
    whole.train(SAVED, STEPS)
    pending.result()
    resumed.load(still, read(tmp_path, resumed))
    assert_same_bits(resumed.bits(), still.bits())


@over_formats
@over_optimizers
def test_every_step_of_two_periods_is_resumed_from_disk(
    name: str, flat: bool, tmp_path: Path
) -> None:
    """Whatever is in flight then, in the run that was saved and in the one that loads."""
    whole = Run(name, flatten_optimizer_state_dict=flat)
    whole.train(0, WINDOW.start)
    resumed = []
    for step in WINDOW:
        run = Run(name, flatten_optimizer_state_dict=flat)
        dcp.save({"optimizer": whole.state()}, checkpoint_id=tmp_path / f"{step}")
        run.train(0, step + 1)
        run.load(whole, read(tmp_path / f"{step}", run))
        assert flights(run) == flights(whole)
        resumed.append((step, run))
        whole.train(step, step + 1)
    whole.train(WINDOW.stop, STEPS)
    for step, run in resumed:
        run.train(step, STEPS)
        assert_same_bits(run.bits(), whole.bits())


@over_optimizers
def test_more_than_one_refresh_of_a_matrix_in_flight(name: str, tmp_path: Path) -> None:
    whole, resumed = (Run(name, staleness=2 * PERIOD) for _ in range(2))
    whole.train(0, WINDOW.stop)
    assert flights(whole) > 2, "more than there are matrices"
    dcp.save({"optimizer": whole.state()}, checkpoint_id=tmp_path)
    resumed.load(whole, read(tmp_path, resumed))
    for run in (whole, resumed):
        run.train(WINDOW.stop, STEPS)
    assert_same_bits(resumed.bits(), whole.bits())


OTHERS = {
    "to sync": ({"staleness": 2}, {"staleness": 0}),
    "from sync": ({"staleness": 0}, {"staleness": 2}),
    "fewer in flight": ({"staleness": 2 * PERIOD}, {"staleness": 2}),
    "more in flight": ({"staleness": 2}, {"staleness": 2 * PERIOD}),
    "another period": ({"staleness": PERIOD}, {"staleness": PERIOD, "period": 10}),
}


@pytest.mark.parametrize(
    ("name", "other", "flat"),
    [("SOAP", other, False) for other in OTHERS]
    + [("SOAP", "more in flight", True), ("SOAP", "from sync", True)]
    + [(name, "fewer in flight", False) for name in ("KLShampoo", "KLSOAP")],
)
def test_runs_of_another_staleness_or_period_take_the_state(
    name: str, other: str, flat: bool, tmp_path: Path
) -> None:
    """What is in flight has other shapes there, or is not known at all."""
    whole, resumed = (
        Run(name, **options, flatten_optimizer_state_dict=flat) for options in OTHERS[other]
    )
    whole.train(0, WINDOW.stop)
    asynchronous = ["to sync" != other, "from sync" != other]
    assert (flights(whole) > 0) == asynchronous[1]
    dcp.save({"optimizer": whole.state()}, checkpoint_id=tmp_path)
    resumed.load(whole, read(tmp_path, resumed))
    assert flights(resumed) == (flights(whole) if all(asynchronous) else 0)
    assert_same_bits(resumed.bits(), whole.bits())
    resumed.train(WINDOW.stop, STEPS)
    assert all(bool(value.isfinite().all()) for value in resumed.bits().values())


def file_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def test_files_have_no_room_for_what_is_not_in_flight(tmp_path: Path) -> None:
    """Where nothing is, a set of bases would be zeros."""
    quiet = Run("SOAP", model=lambda: nn.Linear(256, 256))
    x = gradient((4, 256), torch.float32, 0, 0)
    quiet.model(x).square().mean().backward()
    quiet.optimizer.step()
    assert flights(quiet) == 0
    state = quiet.state()
    dcp.save({"optimizer": state}, checkpoint_id=tmp_path)
    tensors = [t for entries in state["state"].values() for t in entries.items()]
    zeros = sum(t.nbytes for key, t in tensors if key.startswith("shadow"))
    assert zeros == 2 * 256 * 256 * 4 + 2 * 4
    kept = sum(t.nbytes for key, t in tensors) - zeros
    assert kept < file_bytes(tmp_path) < kept + zeros


@over_formats
@over_optimizers
def test_asking_for_the_state_leaves_the_run_alone(name: str, flat: bool) -> None:
    asked, plain = (Run(name, flatten_optimizer_state_dict=flat) for _ in range(2))
    for step in range(STEPS):
        for run in (asked, plain):
            run.train(step, step + 1)
        asked.state()
    assert_same_bits(asked.bits(), plain.bits())


@over_optimizers
def test_asking_before_the_first_step_moves_no_weight(name: str) -> None:
    """torch then makes state by a step with gradients of zero and a learning rate of zero."""
    run = Run(name)
    before = weights(run.model.parameters())
    run.state()
    assert_same_bits(weights(run.model.parameters()), before)
    run.train(0, 20)
    assert all(weight.isfinite().all() for weight in run.model.parameters())


def test_a_state_without_a_gradient_is_made_without_a_factorization(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The template of a large model would take as long as its first step."""
    calls = []
    monkeypatch.setattr(torch.linalg, "eigh", calls.append)
    run = Run("SOAP")
    run.state()
    bases = [v for e in run.optimizer.state.values() for k, v in e.items() if k[:6] == "basis_"]
    assert len(bases) == 4
    assert all(torch.equal(basis, torch.eye(len(basis))) for basis in bases)
    assert not calls


@over_optimizers
def test_model_and_optimizer_together(name: str) -> None:
    whole, resumed = Run(name), Run(name)
    whole.train(0, SAVED)
    model, optimizer = copy.deepcopy(get_state_dict(whole.model, whole.optimizer))
    set_state_dict(
        resumed.model, resumed.optimizer, model_state_dict=model, optim_state_dict=optimizer
    )
    for run in (whole, resumed):
        run.train(SAVED, STEPS)
    assert_same_bits(resumed.bits(), whole.bits())


FULL: list[tuple[dict[str, bool], dict[str, bool]]] = [
    ({"full_state_dict": True}, {"full_state_dict": True}),
    ({"full_state_dict": True, "cpu_offload": True}, {"full_state_dict": True}),
    ({"full_state_dict": True}, {"full_state_dict": True, "broadcast_from_rank0": True}),
]


@pytest.mark.parametrize(("saving", "loading"), FULL, ids=["full", "offload", "broadcast"])
@over_optimizers
def test_full_state_dicts(name: str, saving: dict[str, bool], loading: dict[str, bool]) -> None:
    whole, resumed = Run(name, **saving), Run(name, **loading)
    whole.train(0, SAVED)
    resumed.load(whole, copy.deepcopy(whole.state()))
    for run in (whole, resumed):
        run.train(SAVED, STEPS)
    assert_same_bits(resumed.bits(), whole.bits())


SLIM: dict[str, tuple[dict[str, bool], dict[str, bool]]] = {
    "nested": ({}, {}),
    "flat": ({"flatten_optimizer_state_dict": True}, {"flatten_optimizer_state_dict": True}),
    "full": FULL[0],
    "offload": FULL[1],
    "broadcast": FULL[2],
}


@pytest.mark.parametrize(("saving", "loading"), SLIM.values(), ids=SLIM)
def test_slim_states_from_memory(saving: dict[str, bool], loading: dict[str, bool]) -> None:
    """Whatever the loader has itself: where the state has nothing, some put that."""
    whole, plain = Run("SOAP", **saving), Run("SOAP")
    whole.train(0, SAVED)
    plain.optimizer.load_state_dict(asteria.slim(whole.optimizer.state_dict()))
    plain.model.load_state_dict(whole.model.state_dict())
    for begun in (0, 3):
        resumed = Run("SOAP", **loading)
        resumed.train(0, begun)
        resumed.load(whole, asteria.slim(copy.deepcopy(whole.state())))
        resumed.train(SAVED, SAVED + 4)
        if not begun:
            plain.train(SAVED, SAVED + 4)
        assert_same_bits(resumed.bits(), plain.bits())


@pytest.mark.parametrize("partly", [False, True], ids=["slim template", "partial load"])
@over_formats
def test_slim_states_from_disk(flat: bool, partly: bool, tmp_path: Path) -> None:
    whole, resumed = (Run("SOAP", flatten_optimizer_state_dict=flat) for _ in range(2))
    plain = Run("SOAP")
    whole.train(0, SAVED)
    dcp.save({"optimizer": asteria.slim(whole.state())}, checkpoint_id=tmp_path)
    resumed.train(0, 3)
    template = {"optimizer": resumed.state() if partly else asteria.slim(resumed.state())}
    planner = dcp.DefaultLoadPlanner(allow_partial_load=partly)
    dcp.load(template, checkpoint_id=tmp_path, planner=planner)
    resumed.load(whole, template["optimizer"])
    plain.optimizer.load_state_dict(asteria.slim(whole.optimizer.state_dict()))
    plain.model.load_state_dict(whole.model.state_dict())
    for run in (resumed, plain):
        run.train(SAVED, SAVED + 4)
    assert_same_bits(resumed.bits(), plain.bits())


class Parts(nn.Module):
    """A model of which one part never has a gradient and another is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.used = network()
        self.unused = nn.Linear(4, 4)
        self.frozen = nn.Linear(3, 3).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Of the used part."""
        y: torch.Tensor = self.used(x)
        return y


def outcome(name: str, saved: Path, *, flat: bool, strict: bool, disk: bool) -> Any:
    """Whether a run of `Parts` resumes to the same weights, or what is raised."""
    whole = Run(name, Parts, flatten_optimizer_state_dict=flat, strict=strict)
    resumed = Run(name, Parts, flatten_optimizer_state_dict=flat, strict=strict)
    whole.train(0, SAVED)
    state = copy.deepcopy(whole.state())
    try:
        if disk:
            dcp.save({"optimizer": state}, checkpoint_id=saved)
            template = {"optimizer": resumed.state()}
            planner = dcp.DefaultLoadPlanner(allow_partial_load=not strict)
            dcp.load(template, checkpoint_id=saved, planner=planner)
            state = template["optimizer"]
        resumed.load(whole, state)
    except (Exception, CheckpointException) as error:
        return type(error).__name__
    for run in (whole, resumed):
        run.train(SAVED, STEPS)
    pairs = zip(whole.model.parameters(), resumed.model.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "lax"])
@pytest.mark.parametrize(
    # Flattened states from memory hold dicts in place of tensors then, whatever the optimizer.
    ("flat", "disk"),
    [(False, False), (False, True), (True, True)],
    ids=["nested-memory", "nested-disk", "flat-disk"],
)
def test_parameters_without_a_gradient_are_treated_as_those_of_adamw(
    flat: bool, strict: bool, disk: bool, tmp_path: Path
) -> None:
    ways = {"flat": flat, "strict": strict, "disk": disk}
    adamw = outcome("AdamW", tmp_path / "adamw", **ways)
    assert outcome("SOAP", tmp_path / "ours", **ways) == adamw
    assert isinstance(adamw, str) if strict else adamw is True
