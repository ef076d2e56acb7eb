"""Tensors whose values are elsewhere until somebody wants them.

They stand in state dicts: torch.distributed.checkpoint takes one tensor after the other, so what
each brings into memory is gone before the next. Whoever treats them as tensors gets tensors.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from asteria.errors import StoreError

__all__ = ["Distant", "Opened", "Source", "Values", "plain"]

_HOST = torch.device("cpu")
_ROW_MAJOR = torch.contiguous_format


class Source(Protocol):
    """Where values are that never change. Any thread."""

    lasts: bool
    """Whether they can be read at any time; else until the state of the optimizer changes."""

    def read(self) -> Tensor:
        """The values, in memory that nobody else writes to, or expanded from a single element.

        Raises StoreError where they cannot be had.
        """

    def replaced(self, value: Tensor) -> Source | None:
        """Where ``value`` is kept if it takes the place of these; None is memory.

        Raises StoreError if there is no room.
        """


class Values:
    """What a distant tensor and its aliases stand for. Any thread."""

    def __init__(
        self,
        source: Source | None,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device = _HOST,
        *,
        tell: Callable[[Values], None] | None = None,
        keeps: object = None,
    ) -> None:
        """``device`` is where whoever asks gets them.

        ``tell`` is told of these and of copies; ``keeps`` is kept alive by all of them.
        """
        self.source = source
        """None once they are held."""
        self.shape = tuple(shape)
        self.dtype = dtype
        self.device = device
        self._held: Tensor | None = None
        """On the device, once somebody wanted to have them there."""
        self._lock = threading.Lock()
        self._tell, self._keeps = tell, keeps
        if tell is not None:
            tell(self)

    def read(self) -> Tensor:
        """The values of now, to look at; raises StoreError."""
        source = self.source
        return self.hold() if source is None else source.read().to(self.device)

    def on_host(self) -> Tensor:
        """The values of now in host memory, to look at; raises StoreError."""
        source = self.source
        return (self.hold() if source is None else source.read()).cpu()

    def hold(self) -> Tensor:
        """The values in memory of their own from now on; raises StoreError."""
        with self._lock:
            if self.source is not None:
                # Who takes an address takes the strides of the distant tensor for granted.
                self._held = self.source.read().to(self.device).contiguous()
                self.source = None
            if self._held is None:
                raise RuntimeError("a distant tensor has no values")
            return self._held

    def exchange(self, old: Source, new: Source) -> None:
        """Take ``new``, which has the same values, in place of ``old``, if that is their source."""
        with self._lock:
            if self.source is old:
                self.source = new

    def replace(self, value: Tensor) -> None:
        """Let ``value``, which is broadcast and cast, take the place of all of them."""
        with self._lock:
            if self._held is not None:
                self._held.copy_(value)
                return
            fitting = value.detach().to(_HOST, self.dtype).expand(self.shape)
            source = None
            # Without room there it takes memory, as it would without that tier.
            with contextlib.suppress(StoreError):
                source = None if self.source is None else self.source.replaced(fitting)
            if source is None:
                self._held = torch.empty(self.shape, dtype=self.dtype, device=self.device)
                self._held.copy_(value)
            self.source = source

    def copied(self) -> Values:
        """The same values of now, apart from these from now on; raises StoreError."""
        with self._lock:
            source = self.source if self.source is not None and self.source.lasts else None
            ties: dict[str, Any] = {"tell": self._tell, "keeps": self._keeps}
            twin = Values(source, self.shape, self.dtype, self.device, **ties)
            if source is None:
                held = self._held if self.source is None else self.source.read().to(self.device)
                twin._held = None if held is None else held.clone(memory_format=_ROW_MAJOR)
            return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> Values:
        return self.copied()


class Distant(Tensor):
    """A tensor that reads its values from elsewhere when it is asked for them, each time anew.

    Whoever writes to it or takes a view or an address of it has them in memory from then on. When
    all is overwritten at once, the new values go where the old ones were. Pickled, and so saved by
    `torch.save`, as a plain tensor in host memory. Any thread, as far as that is true of a tensor.
    """

    _origin: Values

    @staticmethod
    def __new__(cls, values: Values) -> Distant:
        """A tensor of these values; row-major, whatever they are."""
        made: Distant = Tensor._make_wrapper_subclass(
            cls, values.shape, dtype=values.dtype, device=values.device
        )
        made._origin = values
        return made

    def __init__(self, values: Values) -> None:
        super().__init__()

    # Everything is decided below, where operations say what they do with their arguments.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run an operation on plain tensors, but for those that need no values."""
        if func is torch.ops.aten.detach.default:
            return type(args[0])(args[0]._origin)
        if func is torch.ops.aten.copy_.default and isinstance(args[0], Distant):
            args[0]._origin.replace(plain(args[1]))
            return args[0]
        given = [_taken(*pair) for pair in zip(args, func._schema.arguments, strict=False)]
        arguments = {argument.name: argument for argument in func._schema.arguments}
        named = {name: _taken(it, arguments[name]) for name, it in (kwargs or {}).items()}
        return func(*given, **named)

    @property
    def is_held(self) -> bool:
        """Whether the values are in memory."""
        return self._origin.source is None

    def read(self) -> Tensor:
        """A plain tensor of the values, to look at; raises StoreError."""
        return self._origin.read()

    def hold(self) -> Tensor:
        """A plain tensor of the values, which are in memory from now on; raises StoreError."""
        return self._origin.hold()

    # What follows does not come by the dispatcher.

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Whoever pickles keeps all of them until the end, for which a device may lack the room.
        return self._origin.on_host().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def __deepcopy__(self, memo: dict[int, Any]) -> Distant:
        return type(self)(self._origin.copied())

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return repr(self.read())

    def numpy(self, *, force: bool = False) -> Any:
        """See `torch.Tensor.numpy`."""
        return self.hold().numpy(force=force)

    def tolist(self) -> Any:
        """See `torch.Tensor.tolist`."""
        return self.read().tolist()

    def data_ptr(self) -> int:
        """See `torch.Tensor.data_ptr`; the values are in memory from now on."""
        return self.hold().data_ptr()

    def untyped_storage(self) -> Any:
        """See `torch.Tensor.untyped_storage`; while nothing but its size is asked, it is empty."""
        return self.hold().untyped_storage() if self.is_held else _Storage(self, self.nbytes)

    def storage(self) -> Any:
        """See `torch.Tensor.storage`, and `untyped_storage`."""
        whole: Any = self.hold().storage if self.is_held else lambda: _Storage(self, self.numel())
        return whole()

    def _typed_storage(self) -> Any:
        return self.hold()._typed_storage()  # type: ignore[no-untyped-call]


def _taken(given: Any, argument: Any) -> Any:
    """What an operation gets; it may keep, or write to, what its schema calls an alias."""
    take = Distant.read if argument.alias_info is None else Distant.hold
    return tree_map_only(Distant, take, given)


class _Storage:
    """Of a distant tensor whose values are not in memory: knows its size.

    Writers of checkpoints ask for that to see whether a tensor is a part of larger memory.
    """

    def __init__(self, tensor: Distant, size: int) -> None:
        self._tensor = tensor
        self._size = size

    def size(self) -> int:
        """As of the storage that it stands for."""
        return self._size

    def nbytes(self) -> int:
        """In bytes."""
        return self._tensor.nbytes

    def __getattr__(self, name: str) -> Any:
        self._tensor.hold()
        return getattr(self._tensor.untyped_storage(), name)


def plain(tensor: Tensor) -> Tensor:
    """``tensor``, or what it reads where it is distant; raises StoreError."""
    return tensor.read() if isinstance(tensor, Distant) else tensor


class Opened:
    """Tensors by name as plain ones, each read once, when it is first asked for."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self._read: dict[str, Tensor] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._read:
            self._read[name] = plain(torch.as_tensor(self._tensors[name]))
        return self._read[name]
