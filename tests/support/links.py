"""A stand-in for the way between host and accelerator that makes a wrong order visible."""

from collections.abc import Iterable

import torch
from torch import Tensor


class CheckedSnapshot:
    """Holds nan until somebody waits for the copy."""

    def __init__(self, tensor: Tensor) -> None:
        self._kept = tensor.clone()
        self._host = torch.full_like(tensor, torch.nan)

    def on_host(self) -> Tensor:
        return self._host.copy_(self._kept)


class CheckedLink:
    """Moves nothing, and tells when it would have been asked to: staged tensors hold nan until
    `arrived`, so that whoever uses one too early spoils every later weight.
    """

    travels = True

    def __init__(self) -> None:
        self.staged_early = 0
        """Transfers that began before the step that needed them."""
        self.stepping = False
        self._under_way: list[tuple[Tensor, Tensor]] = []

    def snapshot(self, tensor: Tensor, *, copy: bool) -> CheckedSnapshot:
        return CheckedSnapshot(tensor)

    def outgoing(self, tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor).copy_(tensor)

    def stage(self, tensor: Tensor) -> Tensor:
        staged = torch.full_like(tensor, torch.nan)
        self._under_way.append((staged, tensor))
        self.staged_early += not self.stepping
        return staged

    def arrived(self, staged: Iterable[Tensor]) -> None:
        for staged, tensor in self._under_way:
            staged.copy_(tensor)
        self._under_way.clear()
