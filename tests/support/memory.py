"""Watching the tensors that a piece of code makes."""

import gc
import sys
import weakref
from typing import Any

import pytest
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def live_objects() -> tuple[int, int]:
    """(all objects, tensors) that the interpreter keeps alive."""
    gc.collect()
    objects = gc.get_objects()
    return len(objects), sum(issubclass(type(one), Tensor) for one in objects)


class TemporaryMemory(TorchDispatchMode):
    """Bytes of the tensors made inside the context: of the largest, and at most at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.largest_bytes = 0
        self.peak_bytes = 0
        self._now_bytes = 0
        self._made: dict[int, int] = {}
        """Storages that were made inside, and the tensors that show each."""
        self._watched: dict[int, weakref.ref[Tensor]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = {_storage(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, Tensor) and id(t) not in self._watched:
                storage = _storage(t)
                if storage in self._made or storage not in given:
                    self._watch(t, storage)
        return result

    def _watch(self, t: Tensor, storage: int) -> None:
        size, identity = t.untyped_storage().nbytes(), id(t)

        def forget(_: object) -> None:
            del self._watched[identity]
            self._made[storage] -= 1
            if not self._made[storage]:
                del self._made[storage]
                self._now_bytes -= size

        if storage not in self._made:
            self._now_bytes += size
            self.largest_bytes = max(self.largest_bytes, size)
            self.peak_bytes = max(self.peak_bytes, self._now_bytes)
        self._made[storage] = self._made.get(storage, 0) + 1
        self._watched[identity] = weakref.ref(t, forget)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def limit_chunks(monkeypatch: pytest.MonkeyPatch, chunk_bytes: int) -> None:
    """Let a chunk of a step be of so many bytes, wherever that number was imported to."""
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "asteria" and hasattr(module, "CHUNK_BYTES"):
            monkeypatch.setattr(module, "CHUNK_BYTES", chunk_bytes)
