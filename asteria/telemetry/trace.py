"""A file that shows what each thread did when."""

from __future__ import annotations

import json
import math
import os
import threading
import warnings
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import NamedTuple

from asteria.errors import ConfigError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["Trace", "Watch"]

_BATCH = 256
"""Spans that are formatted and written at once; one or two milliseconds of work."""

_Span = tuple[str, str, int, int, dict[str, int | float | str]]

# A value that JSON does not know, such as a tensor, is shown as text: tracing must not fail.
_STRICT = json.JSONEncoder(default=str, allow_nan=False, separators=(",", ":"))


class Trace:
    """Writes spans of time in Chrome's trace format, for ui.perfetto.dev and chrome://tracing.

    The file at ``path`` is made anew and belongs to the process that made the trace; in a process
    that was forked from it, the trace does nothing. Spans are kept in memory and written in
    batches; what is written can be opened also if the process dies. A trace that is not closed is
    closed when nobody refers to it any more or the process exits. When writing fails later, a full
    disk say, there is one RuntimeWarning and no further tracing. All methods may be called from any
    thread. Raises ConfigError if the file cannot be made.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._writer = _Writer(Path(path))
        self._spans = self._writer.spans
        # Not a method of this object, which would then never die.
        self._finalizer = weakref.finalize(self, self._writer.close)

    def span(
        self, lane: str, name: str, start_ns: int, end_ns: int, **arguments: int | float | str
    ) -> None:
        """Something that went on from ``start_ns`` to ``end_ns``, by time.perf_counter_ns().

        A lane is a row of the picture; spans of one lane nest or follow each other. ``arguments``
        are shown with the span. Half a microsecond; every 256th call writes the batch, one or two
        milliseconds, unless another thread does. After ``close`` it does nothing.
        """
        self._spans.append((lane, name, start_ns, end_ns, arguments))
        if len(self._spans) >= _BATCH:
            self._writer.write(wait=False)

    def flush(self) -> None:
        """Writes all spans that were added before the call."""
        self._writer.write(wait=True)

    def close(self) -> None:
        """Writes what is left and completes the file; calling again does nothing."""
        self._finalizer()


class Watch(NamedTuple):
    """What tells the time of what is done, and writes it down."""

    clock: Callable[[], float]
    """Seconds, as `time.perf_counter`."""
    trace: Trace | None


class _Writer:
    """The file of a trace; it outlives the trace until the file is complete."""

    def __init__(self, path: Path) -> None:
        # Appending to a deque and taking from it need no lock.
        self.spans: deque[_Span] = deque()
        self._path = path
        self._lock = threading.Lock()
        self._process = os.getpid()
        self._lanes: dict[str, int] = {}
        self._size_bytes = 0
        self._file: FileIO | None = None
        try:
            # Unbuffered: a fork must not find half a batch, which the child would write once more.
            self._file = FileIO(path, "a")
            _claim(self._file)
            self._file.truncate(0)
            self._append(f"[\n{_metadata(self._process, 0, 'process_name', name='asteria')}")
        except BlockingIOError:
            if self._file is not None:
                self._file.close()
            raise ConfigError(
                f"a trace was asked for in {str(path)!r}, which another optimizer or process is "
                "writing: give each a path of its own"
            ) from None
        except OSError as error:
            if self._file is not None:
                self._file.close()
            raise ConfigError(
                f"a trace was asked for in {str(path)!r}, which cannot be written "
                f"({error.strerror or error}): give a file in a folder that exists, is writable "
                "and has space"
            ) from error

    def write(self, *, wait: bool) -> None:
        """Writes the spans that are there; without ``wait`` only if no other thread is writing."""
        self._write(wait=wait, last=False)

    def close(self) -> None:
        """Writes the spans that are there and the end of the file."""
        self._write(wait=True, last=True)

    def _write(self, *, wait: bool, last: bool) -> None:
        if os.getpid() != self._process:
            # A forked child. The lock may have been held when it was copied: leave that alone.
            self.spans.clear()
            if self._file is not None:
                self._file.close()
            return
        if not self._lock.acquire(blocking=wait):
            return
        failure = None
        try:
            # As many as there are now: other threads go on adding.
            taken = [self.spans.popleft() for _ in range(len(self.spans))]
            if self._file is not None:
                text = "".join(map(self._format, taken))
                failure = self._try_append(text + "\n]\n" if last else text)
                if last:
                    self._end()
        finally:
            self._lock.release()
        if failure is not None:
            # Not under the lock, and last: where warnings are errors, this raises.
            warnings.warn(
                f"the trace in {str(self._path)!r} ends here, it could not be written: {failure}",
                RuntimeWarning,
                stacklevel=4,
            )

    def _try_append(self, text: str) -> OSError | None:
        try:
            self._append(text)
        except OSError as failure:
            if self._file is not None:
                # Half an event would make the rest unreadable.
                with suppress(OSError):
                    self._file.truncate(self._size_bytes)
                self._end()
            return failure
        return None

    def _append(self, text: str) -> None:
        if self._file is not None:
            rest = memoryview(text.encode("ascii"))
            size_bytes = len(rest)
            while rest:
                # A disk that gets full takes a part, and refuses the next.
                rest = rest[self._file.write(rest) :]
            self._size_bytes += size_bytes

    def _end(self) -> None:
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
            self._file = None

    def _format(self, span: _Span) -> str:
        """An event, after those that introduce its lane if that is new."""
        lane, name, start_ns, end_ns, arguments = span
        row = self._lanes.get(lane, 0)
        introduction = ""
        if not row:
            row = self._lanes[lane] = len(self._lanes) + 1
            introduction = (
                f",\n{_metadata(self._process, row, 'thread_name', name=lane)}"
                f",\n{_metadata(self._process, row, 'thread_sort_index', sort_index=row)}"
            )
        return (
            f'{introduction},\n{{"ph":"X","pid":{self._process},"tid":{row},'
            f'"ts":{_microseconds(start_ns)},"dur":{_microseconds(max(end_ns - start_ns, 0))},'
            f'"name":{_json(name)},"args":{_json(arguments)}}}'
        )


def _metadata(process: int, row: int, kind: str, **arguments: int | str) -> str:
    """An event that describes the process or a row."""
    return _json({"ph": "M", "pid": process, "tid": row, "name": kind, "args": arguments})


def _microseconds(time_ns: int) -> str:
    # Not by floats, which have no nanoseconds left after some months of uptime.
    return f"{time_ns // 1000}.{time_ns % 1000:03d}"


def _json(value: object) -> str:
    try:
        return _STRICT.encode(value)
    except ValueError:
        # JSON has neither nan nor inf.
        if isinstance(value, dict):
            value = {
                key: str(one) if isinstance(one, float) and not math.isfinite(one) else one
                for key, one in value.items()
            }
        return _STRICT.encode(value)


def _claim(file: FileIO) -> None:
    """Lock the file for as long as it is open; raises BlockingIOError if somebody else has it."""
    if fcntl is not None:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
