"""Buffers from rank to rank, on threads of their own, so that nobody waits who trains.

A rank takes what comes from anybody at any time: nothing is agreed on beforehand, results go off
when they are there, and a rank that has gone is noticed by who sends to it.
"""

from __future__ import annotations

import atexit
import os
import queue
import threading
import weakref
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Protocol, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from asteria.distributed.groups import Assembly
from asteria.refresh.threads import pause_ended_threads

__all__ = ["GlooWire", "Sent", "Take", "Wire"]

Take: TypeAlias = Callable[[int, Tensor | Exception], None]
"""Called with (rank it comes from, buffer), or with the reason why nothing comes any more; raises
nothing."""
Sent: TypeAlias = Callable[[Exception | None], None]
"""Called when a buffer has arrived, or with the reason why it never will; raises nothing."""

_FOREVER = timedelta(days=1000)


class Wire(Protocol):
    """Carries buffers, (nbytes,) uint8 in host memory, from rank to rank, in order. Any thread."""

    def listen(self, take: Take) -> None:
        """From now on call ``take``, on one thread, for what arrives; without keeping it alive."""

    def send(self, rank: int, buffer: Tensor, sent: Sent) -> None:
        """Begin to send; nobody changes ``buffer`` any more. Never waits."""


class GlooWire:
    """Point-to-point messages of gloo: a header (8 bytes) that anybody may send, then the buffer.

    Two daemon threads: one takes what arrives, one waits until what was sent has arrived. They end
    with the process.
    """

    def __init__(self, assembly: Assembly) -> None:
        self._assembly = assembly
        self._sending: queue.SimpleQueue[tuple[list[Any], list[Tensor], Sent]] = queue.SimpleQueue()
        self._order = threading.Lock()
        self._waits = False
        _WIRES.add(self)
        self._pid = os.getpid()

    def listen(self, take: Take) -> None:
        """See `Wire`."""
        arguments = (self._assembly, weakref.WeakMethod(take))
        name = "letters from other ranks"
        threading.Thread(target=_receive, args=arguments, name=name, daemon=True).start()

    def send(self, rank: int, buffer: Tensor, sent: Sent) -> None:
        """See `Wire`."""
        group, tag = self._assembly.group, 2 * self._assembly.channel
        header = torch.tensor([buffer.numel()], dtype=torch.int64, device="cpu")
        works: list[Any] = []
        try:
            with self._order:  # a header and its buffer follow on one another
                if not self._waits:
                    name, todo = "letters to other ranks", (self._sending,)
                    threading.Thread(target=_await, args=todo, name=name, daemon=True).start()
                    self._waits = True
                to = self._assembly.global_ranks[rank]
                works.append(dist.isend(header, to, group=group, tag=tag))
                works.append(dist.isend(buffer, to, group=group, tag=tag + 1))
        except (RuntimeError, ValueError) as error:
            sent(error)
            return
        self._sending.put((works, [header, buffer], sent))


_WIRES: weakref.WeakSet[GlooWire] = weakref.WeakSet()
"""All that there are, for the end of the process only."""


@atexit.register
def _leave() -> None:
    """A letter that comes while the interpreter ends must not spoil the end of the process."""
    if any(wire._pid == os.getpid() for wire in _WIRES):
        pause_ended_threads()


def _receive(assembly: Assembly, ears: weakref.ref[Take]) -> None:
    """Body of the receiving thread."""
    group, tag = assembly.group, 2 * assembly.channel
    received: Tensor | Exception
    left = len(assembly.global_ranks)
    while True:
        header = torch.empty(1, dtype=torch.int64, device="cpu")
        source = -1
        try:
            announced: Any = dist.irecv(header, src=None, group=group, tag=tag)
            announced.wait(_FOREVER)
            source = announced._source_rank()
            received = torch.empty(int(header), dtype=torch.uint8, device="cpu")
            sender = assembly.global_ranks[source]
            content: Any = dist.irecv(received, src=sender, group=group, tag=tag + 1)
            content.wait(_FOREVER)
        except (RuntimeError, ValueError) as error:
            # Each rank that goes ends one of these, and who waits for it finds out; all others
            # are still to be heard. More of them are the end of the group.
            left -= 1
            if source >= 0 or left > 0:
                continue
            received = error
        take = ears()
        if take is not None:
            take(source, received)
        if isinstance(received, Exception):
            return
        del take, received


def _await(sending: queue.SimpleQueue[tuple[list[Any], list[Tensor], Sent]]) -> None:
    """Body of the thread that waits until what was sent has arrived."""
    while True:
        works, _, sent = sending.get()
        try:
            for work in works:
                work.wait(_FOREVER)
        except RuntimeError as error:
            sent(error)
        else:
            sent(None)
        del works, sent
