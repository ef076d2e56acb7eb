"""The thread that receives letters: a rank that goes ends one receive, and not the thread."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from asteria.distributed import wire
from asteria.distributed.groups import Assembly
from asteria.distributed.topology import Topology

GROUP: Any = None
THREE = Assembly(GROUP, Topology.even(3, 3), 0, 1.0, 0, (0, 1, 2))


class Receiving:
    """Stands for receives: numbers are a letter of so many bytes from rank 1, texts are errors."""

    def __init__(self, events: list[int | str]) -> None:
        self._events: Iterator[int | str] = iter(events)

    def __call__(self, tensor: Tensor, **_: Any) -> "Receiving":
        self._tensor = tensor
        return self

    def wait(self, _: Any) -> None:
        event = next(self._events)
        if isinstance(event, str):
            raise RuntimeError(event)
        self._tensor.fill_(event)

    def _source_rank(self) -> int:
        return 1


class Ears:
    """Takes what comes."""

    def __init__(self) -> None:
        self.heard: list[tuple[int, str]] = []

    def take(self, source: int, received: Tensor | Exception) -> None:
        """See `Wire`."""
        text = str(received) if isinstance(received, Exception) else f"{received.numel()} bytes"
        self.heard.append((source, text))


@pytest.mark.parametrize(
    ("events", "heard"),
    [
        ([2, 0, "closed", 3, 0], [(1, "2 bytes"), (1, "3 bytes")]),
        ([2, "closed", 3, 0], [(1, "3 bytes")]),
        (["closed", "closed", 4, 0], [(1, "4 bytes")]),
    ],
    ids=["between letters", "in a letter", "two of them"],
)
def test_others_are_heard_when_a_rank_has_gone(
    events: list[int | str], heard: list[tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    ears = Ears()
    monkeypatch.setattr(torch.distributed, "irecv", Receiving([*events, *["destroyed"] * 3]))
    wire._receive(THREE, lambda: ears.take)  # type: ignore[arg-type]
    assert ears.heard == [*heard, (-1, "destroyed")]


def test_a_group_that_is_gone_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    ears = Ears()
    monkeypatch.setattr(torch.distributed, "irecv", Receiving(["destroyed"] * 3))
    wire._receive(THREE, lambda: ears.take)  # type: ignore[arg-type]
    assert ears.heard == [(-1, "destroyed")]
