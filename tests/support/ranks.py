"""Several ranks in one process: an optimizer and a thread each, and a network between them."""

import random
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from asteria import RuntimeConfig
from asteria.distributed.links import LinkCounters
from asteria.distributed.post import Post
from asteria.distributed.topology import Topology
from asteria.optim.optimizer import SecondOrderOptimizer
from asteria.refresh.pool import Executor
from asteria.runtime.engine import Engine
from asteria.runtime.peers import Membership, Peers
from tests.support.asynchronous import build
from tests.support.execution import ManualExecutor
from tests.support.network import Network
from tests.support.training import Bits, everything, set_gradients

TIMEOUT_S = 60.0


class Ranks:
    """Optimizers of the same parameters, one for each rank of ``topology``.

    Each rank's workers do a random number of jobs whenever it begins a step.
    """

    def __init__(
        self,
        name: str,
        topology: Topology,
        runtime: RuntimeConfig | None = None,
        *,
        seed: int = 0,
        timeout_s: float = TIMEOUT_S,
        **options: Any,
    ) -> None:
        self.topology = topology
        self.chance = random.Random(seed)
        self.network = Network(topology.size, random.Random(seed))
        self.credentials: list[Mapping[str, str]] = []
        self.workers = [ManualExecutor() for _ in range(topology.size)]
        self.optimizers = [
            self._optimizer(rank, name, runtime, timeout_s, options)
            for rank in range(topology.size)
        ]

    def _optimizer(
        self,
        rank: int,
        name: str,
        runtime: RuntimeConfig | None,
        timeout_s: float,
        options: dict[str, Any],
    ) -> SecondOrderOptimizer:
        optimizer = build(name, runtime, **options)
        config = optimizer._runtime

        def meeting(_: RuntimeConfig, credentials: Mapping[str, str]) -> Membership:
            self.credentials.append(credentials)
            counters = LinkCounters(rank, self.topology)
            post = Post(rank, self.network.wires[rank], counters, timeout_s=timeout_s)
            return Membership(rank, self.topology, post)

        executor: Executor = self.workers[rank]
        optimizer._engine = Engine(config, executor=executor, peers=Peers(config, meeting))
        return optimizer

    def on_all(self, work: Callable[[int], Any]) -> list[Any]:
        """``work(rank)`` on all ranks at a time; their results, or what was raised."""
        results: list[Any] = [None] * self.topology.size

        def run(rank: int) -> None:
            try:
                results[rank] = work(rank)
            except Exception as error:
                results[rank] = error

        stop = self.network.run()
        threads = [threading.Thread(target=run, args=(r,)) for r in range(self.topology.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        stop()
        return results

    def train(self, steps: Sequence[int], *, scale: float = 1.0) -> list[Any]:
        """Steps on all ranks, which meet at none of them; what was raised, by rank."""
        seeds = [self.chance.random() for _ in range(self.topology.size)]

        def work(rank: int) -> None:
            optimizer, chance = self.optimizers[rank], random.Random(seeds[rank])
            params = optimizer.param_groups[0]["params"]
            for step in steps:
                set_gradients(params, step, scale=scale)
                self.workers[rank].run_some(chance)
                optimizer.step()

        return self.on_all(work)

    def bits(self) -> list[Bits]:
        """All weights and all state, as each rank sees them."""
        return self.on_all(lambda rank: everything(self.optimizers[rank]))
