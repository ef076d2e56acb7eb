"""What the optimizer shows as a parameter's state."""

from __future__ import annotations

import copy
from collections.abc import Callable, ItemsView, Iterator, Mapping, ValuesView
from typing import Any, NamedTuple

from torch import Tensor

__all__ = ["Entries"]


class _Away(NamedTuple):
    """How to get a tensor: now, and in a form that is read later."""

    read: Callable[[], Tensor]
    promise: Callable[[], Tensor]


class Entries(dict[str, Tensor]):
    """A dict of tensors, some of which are read from a lower tier when they are asked for.

    What lies in the memory of the device is a view of the state itself; what does not is a copy
    in host memory, made anew each time. Pickled and copied as a plain dict.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._away: dict[str, _Away] = {}
        self.changed = True
        """Whether anything was set or removed since somebody made this False."""

    def put_away(
        self,
        key: str,
        read: Callable[[], Tensor],
        promise: Callable[[], Tensor] | None = None,
    ) -> None:
        """Ask ``read`` for the tensor of ``key`` from now on.

        ``promise`` makes a tensor of the values of now that reads them when they are needed.
        """
        self.changed = True
        dict.pop(self, key, None)
        self._away[key] = _Away(read, promise or read)

    def is_away(self, key: str) -> bool:
        """Whether the tensor of ``key`` is read when it is asked for."""
        return key in self._away

    @property
    def is_untouched(self) -> bool:
        """Whether there is nothing but what is read when it is asked for."""
        return not dict.__len__(self)

    def lend(self, key: str, other: Entries, name: str | None = None) -> None:
        """Let ``other`` read, as ``name``, what is away here."""
        other.put_away(name or key, *self._away[key])

    def promised(self) -> dict[str, Tensor]:
        """A plain dict of all tensors as they are now; what is away may be read later."""
        return {
            key: self._away[key].promise() if key in self._away else dict.__getitem__(self, key)
            for key in self
        }

    def __getitem__(self, key: str) -> Tensor:
        away = self._away.get(key)
        return dict.__getitem__(self, key) if away is None else away.read()

    def __setitem__(self, key: str, value: Tensor) -> None:
        self.changed = True
        self._away.pop(key, None)
        dict.__setitem__(self, key, value)

    def __delitem__(self, key: str) -> None:
        self.changed = True
        if self._away.pop(key, None) is None:
            dict.__delitem__(self, key)

    def __contains__(self, key: object) -> bool:
        return dict.__contains__(self, key) or key in self._away

    def __iter__(self) -> Iterator[str]:
        # A list, for who moves state to a device replaces values while going through them.
        return iter([*dict.__iter__(self), *self._away])

    def __len__(self) -> int:
        return dict.__len__(self) + len(self._away)

    def __eq__(self, other: object) -> bool:
        return dict(self) == other

    def __ne__(self, other: object) -> bool:
        return dict(self) != other

    def __reversed__(self) -> Iterator[str]:
        return reversed(list(self))

    __hash__ = None

    def get(self, key: str, default: Any = None) -> Any:
        """The tensor of ``key``, or ``default``."""
        return self[key] if key in self else default

    def keys(self) -> Any:
        """Names of all tensors."""
        return dict.fromkeys(self).keys()

    def values(self) -> Any:
        """All tensors."""
        return ValuesView(self)

    def items(self) -> Any:
        """Names and tensors."""
        return ItemsView(self)

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Set several tensors."""
        for key, value in dict(*args, **kwargs).items():
            self[key] = value

    def __ior__(self, other: Any) -> Any:  # type: ignore[misc]
        self.update(other)
        return self

    def setdefault(self, key: str, default: Any = None) -> Any:
        """The tensor of ``key``, which is set if it is missing."""
        if key not in self:
            self[key] = default
        return self[key]

    def popitem(self) -> tuple[str, Tensor]:
        """Remove the last key and return it with its tensor."""
        key = list(self)[-1] if self else ""
        return key, self.pop(key)

    def __repr__(self) -> str:
        return repr(dict(self))

    def pop(self, key: str, *default: Any) -> Any:
        """Remove ``key`` and return its tensor."""
        if key not in self:
            return dict.pop(self, key, *default)
        value = self[key]
        del self[key]
        return value

    def clear(self) -> None:
        """Remove everything."""
        self.changed = True
        self._away.clear()
        dict.clear(self)

    def copy(self) -> dict[str, Tensor]:
        """A plain dict of all tensors."""
        return dict(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)

    def __deepcopy__(self, memo: dict[int, Any]) -> Mapping[str, Tensor]:
        return copy.deepcopy(dict(self), memo)
