"""Whether a step may be made: what its gradients, and the devices, say."""

from __future__ import annotations

from torch import Tensor

from asteria.config.runtime import RuntimeConfig
from asteria.runtime.guard import DeviceGuard, bad_names, nonfinite_error, surely_finite
from asteria.runtime.peers import Peers
from asteria.runtime.sharded import ShardedParameters, Together
from asteria.runtime.verdicts import Verdicts
from asteria.telemetry.counters import Counters

__all__ = ["Judge"]


class Judge:
    """Accepts or refuses steps, and counts those that are skipped. For the training thread."""

    def __init__(
        self,
        config: RuntimeConfig,
        counters: Counters,
        verdicts: Verdicts,
        peers: Peers,
        sharded: ShardedParameters,
    ) -> None:
        self._config = config
        self._counters = counters
        self._verdicts = verdicts
        self._peers = peers
        self._sharded = sharded
        self._guard = DeviceGuard()

    def settle(self) -> None:
        """Wait for the device's word on every step, so that the counters are right.

        Raises NonFiniteGradientError if the configuration asks for it and a step was refused.
        """
        self._collect_verdicts(wait=True)

    def accepts(
        self,
        names: list[str],
        gradients: list[Tensor],
        *,
        ready: bool,
        together: Together | None = None,
    ) -> tuple[bool, Tensor | None]:
        """Look at a step's gradients, before anything is changed: (whether to step, gate).

        On the host, or with ``ready`` False (state is yet to be made, which waits for the device
        anyway), a non-finite gradient is found now; else a gate comes back that closes on the
        device, and the report follows at a later step. Raises NonFiniteGradientError if the
        configuration asks for it. What is decided ``together`` is the same on all ranks.
        """
        self._counters.steps += 1
        # With others all must learn of a refused step at the same one. Waiting for the latest one
        # lets the host be a step ahead of the device, no more.
        self._collect_verdicts(wait=self._peers.expected or together is not None)
        on_host = all(gradient.is_cpu for gradient in gradients)
        fine = on_host and surely_finite(gradients)
        if fine and together is None:
            return True, None
        if ready and not on_host:
            return True, self._guard.gate(gradients, names, together)
        bad = [] if fine else bad_names(names, gradients)
        if together is not None:
            with self._sharded.traffic.deciding(together.council):
                bad = together.agree(bad)
        if bad:
            self._count_skips([bad])
        return not bad, None

    def _collect_verdicts(self, *, wait: bool) -> None:
        self._verdicts.collect(wait=wait)
        self._count_skips(self._guard.collect(wait=wait))

    def _count_skips(self, steps: list[list[str]]) -> None:
        """Count skipped steps, given the names of their bad gradients; raise for the first."""
        self._counters.skipped_steps += len(steps)
        if steps and self._config.nonfinite == "raise":
            raise nonfinite_error(steps[0])
