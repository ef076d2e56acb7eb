"""A folder that lives as long as the process that made it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path

from asteria.errors import ConfigError

__all__ = ["RunFolder"]

_LOCK = "asteria.lock"
_NAME = re.compile(r"asteria-.+-\d+-[0-9a-f]{16}")


class RunFolder:
    """A new folder inside ``path`` for this process alone; ``path`` is made if it is missing.

    Its lock file is locked (``flock``) as long as the process lives, however it ends, so that a
    folder whose lock is free belongs to nobody: the next one who opens ``path`` removes it. Whoever
    makes or removes a folder holds a lock on ``path`` itself meanwhile, so nobody sees a folder
    that has no lock yet, and no two remove the same one. Only folders that carry our name and our
    lock file are looked at.

    The folder goes with `remove`, with the last reference, or at the exit of the interpreter; a
    forked child leaves it alone. Any thread.
    """

    def __init__(self, path: str | os.PathLike[str], label: str) -> None:
        """``label`` becomes part of the name: whose folder it is, as ``"rank0"``.

        Raises:
            ConfigError: ``path`` cannot be used as a folder, or ``label`` not as part of a name.
        """
        if not label or "/" in label or "\0" in label:
            raise ConfigError(f"label: {label!r} is not a part of a file name: pass one as 'rank0'")
        root = Path(path).absolute()
        name = f"asteria-{label}-{os.getpid()}-{secrets.token_hex(8)}"
        self.path = root / name
        """Absolute."""
        try:
            root.mkdir(parents=True, exist_ok=True)
            with _locked(root):
                for folder in sorted(root.iterdir()):
                    _reclaim(folder)
                self.path.mkdir(mode=0o700)
                lock = _open_lock(self.path, os.O_CREAT | os.O_EXCL)
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(
                f"nvme_path: cannot make a folder in {root}: {error}; "
                "name a folder on a local disk that this process may write to"
            ) from error
        self._finalizer = weakref.finalize(self, _remove, self.path, lock, os.getpid())

    def remove(self) -> None:
        """Remove the folder with all that is in it. Doing it twice changes nothing."""
        self._finalizer()


@contextlib.contextmanager
def _locked(root: Path) -> Iterator[None]:
    """Nobody else makes or removes folders in ``root`` meanwhile."""
    directory = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        yield
    finally:
        os.close(directory)


def _open_lock(folder: Path, flags: int = 0) -> int:
    return os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | flags, 0o600)


def _reclaim(folder: Path) -> None:
    """Remove a folder of ours whose process is gone; ``root`` is locked."""
    if not _NAME.fullmatch(folder.name) or folder.is_symlink():
        return
    try:
        lock = _open_lock(folder)
    except OSError:
        return  # not ours, or another user's
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _empty(folder)
    except OSError:
        return  # its process is alive
    finally:
        os.close(lock)


def _empty(folder: Path) -> None:
    """Remove ``folder``, its lock last: until then it can be recognized. Never raises."""
    with contextlib.suppress(OSError):
        for entry in folder.iterdir():
            if entry.name != _LOCK:
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry, ignore_errors=True)
                else:
                    entry.unlink(missing_ok=True)
        (folder / _LOCK).unlink(missing_ok=True)
        try:
            folder.rmdir()
        except OSError:
            # A late write: with its lock there, the next one who comes removes it.
            os.close(_open_lock(folder, os.O_CREAT))


def _remove(folder: Path, lock: int, pid: int) -> None:
    if pid == os.getpid():
        _empty(folder)
        os.close(lock)
