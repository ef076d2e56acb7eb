"""Groups of processes that run one function each, on gloo."""

import multiprocessing
import pickle
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT_S = 60.0
"""Longest wait of one process for another."""
_RESULT_S = 4 * TIMEOUT_S
"""Longest wait for what a process computes: minutes where others keep the cores busy."""


class Crew:
    """One process for each rank, all in the default group; children of a server without threads.

    Their functions get their rank and ``arguments``; what they return comes from `results`.
    """

    def __init__(
        self,
        size: int,
        store: Path,
        body: Callable[..., Any],
        *arguments: Any,
        group_timeout_s: float = TIMEOUT_S,
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(
            [
                "tests.support.processes",
                "tests.support.asynchronous",
                "torch.distributed.checkpoint.state_dict",
                "torch.distributed.fsdp",
                "torch._dynamo",
            ]
        )
        self.links: list[Connection] = []
        self.processes: list[ForkServerProcess] = []
        for rank in range(size):
            mine, theirs = context.Pipe()
            given = (rank, size, store, group_timeout_s, theirs, body, arguments)
            process = context.Process(target=_work, args=given, daemon=True)
            process.start()
            theirs.close()
            self.links.append(mine)
            self.processes.append(process)

    def result(self, rank: int) -> Any:
        """What a rank has returned; raises what it raised, as an AssertionError."""
        link = self.links[rank]
        assert link.poll(_RESULT_S), f"rank {rank} is stuck"
        failed, value = pickle.loads(link.recv_bytes())
        assert not failed, f"rank {rank} raised\n{value}"
        return value

    def results(self) -> list[Any]:
        """Of all ranks, which have ended then."""
        values = [self.result(rank) for rank in range(len(self.links))]
        for process in self.processes:
            process.join(TIMEOUT_S)
            assert process.exitcode == 0
        return values

    def close(self) -> None:
        """End what is left."""
        for process in self.processes:
            process.kill()
            process.join()


def gather(size: int, store: Path, body: Callable[..., Any], *arguments: Any) -> Sequence[Any]:
    """The results of ``body(rank, *arguments)`` in so many processes, by rank."""
    crew = Crew(size, store, body, *arguments)
    try:
        return crew.results()
    finally:
        crew.close()


def _work(
    rank: int,
    size: int,
    store: Path,
    group_timeout_s: float,
    link: Connection,
    body: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=group_timeout_s),
    )
    try:
        _send(link, False, body(rank, *arguments))
    except BaseException:
        _send(link, True, traceback.format_exc())
        raise SystemExit(1) from None


def _send(link: Connection, failed: bool, value: Any) -> None:
    """As plain bytes: torch's way to pass tensors between processes needs the sender to live on."""
    link.send_bytes(pickle.dumps((failed, value)))
