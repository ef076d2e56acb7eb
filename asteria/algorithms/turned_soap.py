"""SOAP whose factors are kept in the coordinates of their eigenbases."""

from __future__ import annotations

from torch import Tensor

from asteria.algorithms.algorithm import BlockState, Pair
from asteria.algorithms.rotated_adam import projected_update_
from asteria.algorithms.soap import SOAP
from asteria.config.hyperparameters import Hyperparameters

__all__ = ["TurnedSOAP"]


class TurnedSOAP(SOAP):
    """SOAP with Q_k^T L_k Q_k in place of every factor L_k.

    With G' = G in all bases it grows by G'_(k) G'_(k)^T: the other modes' bases are orthogonal and
    drop out, and G' is what Adam needs anyway. Bases begin at the identity, of which the first
    gradient, and factors that have seen no more, are given.
    """

    in_bases = True

    def direction_(
        self,
        state: BlockState,
        gradient: Tensor,
        hyper: Hyperparameters,
        *,
        step: int,
        scratch: Pair,
        gate: Tensor | None,
    ) -> tuple[Tensor, float]:
        """Advance Adam with the projected ``gradient``, which is overwritten; project back."""
        update = projected_update_(state, gradient, hyper, scratch=scratch, gate=gate)
        return update, self.scale(hyper, step)
