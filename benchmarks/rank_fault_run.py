"""One rank of a training run that may be hurt: what it does, and what it tells of its end."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from asteria import SOAP, RuntimeConfig
from asteria.distributed.sharded_exchange import Transit
from asteria.runtime import host_refresh
from asteria.runtime.stepper import Stepper

KILL, STOP = "kill -9", "SIGSTOP"
REPLICATED, EXACT, LOCAL = MODES = ("replicated", "exact", "local")
"""DistributedDataParallel, and FSDP2 with both kinds of shards."""
PHASES = (
    "before the gradients",
    "in backward",
    "before step()",
    "in step()",
    "in a refresh",
    "after step()",
    "while saving",
)
"""Where a rank may be hurt. In step() is, with exact shards, while gradients are gathered."""
ROWS = (8, 6, 9, 12, 7)
WIDTH = 6
PERIOD = 3
"""Steps between refreshes: something is in flight all the time."""
SAVE_EVERY = 4
"""Steps."""
LATEST_S = 0.004
"""A slow worker is late by at most so much, which is longer than a step."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A run, and what happens to one of its ranks."""

    ranks: int
    steps: int
    timeout_s: float
    """Of the process group."""
    mode: Literal["replicated", "exact", "local"] = "replicated"
    victim: int = -1
    """A rank; -1 for none."""
    phase: str = PHASES[0]
    step: int = 0
    """At which it happens; a refresh is the first one from then on."""
    how: Literal["kill -9", "SIGSTOP"] = "kill -9"
    install: Literal["scheduled", "ready"] = "scheduled"
    seed: int = 0
    """Of the delays of the workers."""


class Branches(nn.Module):
    """Layers side by side, whose gradients are whole numbers: sums are exact in any order."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, rows) for rows in ROWS)

    def forward(self, x: Tensor) -> Tensor:
        """A sum over (b, WIDTH) integers, on the way of whose gradient each layer is passed."""
        total = x.new_zeros(())
        for layer in self.layers:
            y = layer(x)
            total = total + (y * (torch.arange(y.shape[1]) % 3 + 1)).sum()
        return total


def batch(step: int, rank: int) -> Tensor:
    """One rank's examples, of whole numbers."""
    generator = torch.Generator().manual_seed(step * 1013 + rank)
    return torch.randint(-4, 5, (2, WIDTH), generator=generator).float()


class Rank:
    """The training of one rank."""

    def __init__(self, plan: Plan, rank: int, folder: Path, tell: Callable[..., None]) -> None:
        """``tell(what, *values)`` reports to the parent; checkpoints are in ``folder``."""
        self._plan = plan
        self._rank = rank
        self._folder = folder
        self._tell = tell
        self._step = 0
        self.model: nn.Module = Branches()
        self.model.get_submodule("layers.2").register_forward_hook(self._watch_backward)
        if plan.mode == REPLICATED:
            self.model = DistributedDataParallel(self.model)
        else:
            mesh = init_device_mesh("cpu", (plan.ranks,))
            for layer in self.model.get_submodule("layers").children():
                fully_shard(layer, mesh=mesh)
            fully_shard(self.model, mesh=mesh)
        shards: Any = LOCAL if plan.mode == LOCAL else EXACT
        self.optimizer = SOAP(
            self.model.named_parameters(),
            lr=2.0**-6,
            precondition_frequency=PERIOD,
            shampoo_beta=0.5,
            runtime=RuntimeConfig(install=plan.install, workers=1, shards=shards),
        )

    def train(self) -> None:
        """All steps from the last checkpoint on."""
        for step in range(self._resume(), self._plan.steps):
            self._step = step
            self._reach("before the gradients")
            self.optimizer.zero_grad()
            # The wrappers take the mean over ranks.
            (self.model(batch(step, self._rank)) * self._plan.ranks).backward()
            self._reach("before step()")
            self.optimizer.step()
            self._reach("after step()")
            if step % SAVE_EVERY == SAVE_EVERY - 1:
                self._save()
        dist.barrier()  # rank 0 may be reading factors that others keep

    def weights(self) -> bytes:
        """Of this rank, bit by bit."""
        parts = [p.to_local() if isinstance(p, DTensor) else p for p in self.model.parameters()]
        return b"".join(part.detach().numpy().tobytes() for part in parts)

    def _watch_backward(self, _: nn.Module, __: object, y: Tensor) -> None:
        y.register_hook(lambda _: self._reach("in backward"))

    def _reach(self, phase: str) -> None:
        plan = self._plan
        late = phase == "in a refresh" and self._step > plan.step
        if (plan.victim, plan.phase) == (self._rank, phase) and (late or self._step == plan.step):
            self._tell("hurt", time.monotonic())
            os.kill(os.getpid(), signal.SIGKILL if plan.how == KILL else signal.SIGSTOP)

    def _save(self) -> None:
        """By rank 0, while the others go on to their next gradient; or by all, if sharded."""
        folder = self._folder / f"step-{self._step + 1}"
        if self._plan.mode != REPLICATED:
            model, optimizer = get_state_dict(self.model, self.optimizer)
            self._reach("while saving")
            dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=folder)
            return
        if self._rank != 0:
            self._reach("while saving")
            return
        state = {"optimizer": self.optimizer.state_dict(), "model": self.model.state_dict()}
        self._reach("while saving")
        folder.mkdir(exist_ok=True)  # of a save that was interrupted
        torch.save(state, folder / "state")
        (folder / ".metadata").touch()

    def _resume(self) -> int:
        """From the last checkpoint that is complete; its step, or 0."""
        steps = [int(path.parent.name[5:]) for path in self._folder.glob("step-*/.metadata")]
        if not steps:
            return 0
        folder = self._folder / f"step-{max(steps)}"
        if self._plan.mode == REPLICATED:
            saved = torch.load(folder / "state", weights_only=True)
            self.model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            return max(steps)
        model, optimizer = get_state_dict(self.model, self.optimizer)
        state: dict[str, Any] = {"model": model, "optimizer": optimizer}
        dcp.load(state, checkpoint_id=folder)
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        return max(steps)

    @contextlib.contextmanager
    def places(self) -> Iterator[None]:
        """Within it refreshes take their time, as chance has it, and all phases are reached."""
        chance = random.Random(self._plan.seed * 1009 + self._rank)
        refresh = host_refresh.verified_refresh
        gathers = self._plan.mode == EXACT
        owner: Any = Transit if gathers else Stepper
        name = "wait" if gathers else "step"
        part = getattr(owner, name)

        def slow(*arguments: Any, **options: Any) -> Any:
            time.sleep(LATEST_S * chance.random())
            self._reach("in a refresh")
            return refresh(*arguments, **options)

        def reached(*arguments: Any) -> Any:
            self._reach("in step()")
            return part(*arguments)

        with (
            mock.patch.object(host_refresh, "verified_refresh", slow),
            mock.patch.object(owner, name, reached),
        ):
            yield


def run(rank: int, plan: Plan, folder: Path, store: Path, link: Connection) -> None:
    """The process of one rank; tells ("end", seconds, error, weights) at its end."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=plan.ranks,
        timeout=timedelta(seconds=plan.timeout_s),
    )
    training = Rank(plan, rank, folder, lambda *report: link.send(report))
    error = ""
    try:
        with training.places():
            training.train()
    except (Exception, CheckpointException) as raised:  # torch.distributed's, or ours
        error = f"{type(raised).__name__}: {raised}"
    link.send(("end", time.monotonic(), error, training.weights()))
