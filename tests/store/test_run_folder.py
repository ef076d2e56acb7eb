"""Folders go with their process, however it ends, and only then."""

import os
import signal
import sys
from pathlib import Path

import pytest

from asteria import ConfigError, StoreError
from asteria.store.folder import RunFolder
from asteria.store.nvme import NvmeTier
from tests.store.places import noise, read, start_python

OPEN = """
import sys
from asteria.store.nvme import NvmeTier
import torch
tier = NvmeTier(sys.argv[1], budget_bytes=None, label="child")
slot = tier.put(torch.ones(100, dtype=torch.uint8))
slot.wait()
print(tier.path, flush=True)
"""
WAIT = OPEN + "sys.stdin.read()"
RAISE = OPEN + "raise ValueError('training failed')"


def test_a_folder_is_named_locked_and_removed(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "deep" / "er", "rank3")
    assert folder.path.parent == tmp_path / "deep" / "er"
    assert folder.path.name.startswith(f"asteria-rank3-{os.getpid()}-")
    assert folder.path.stat().st_mode & 0o777 == 0o700
    (folder.path / "array").mkdir()
    (folder.path / "array" / "file").touch()
    folder.remove()
    folder.remove()
    assert not list(folder.path.parent.iterdir())


def test_a_folder_goes_with_its_last_reference(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, "rank0")
    path = folder.path
    del folder
    assert not path.exists()


def test_folders_of_living_processes_stay(tmp_path: Path) -> None:
    first = NvmeTier(tmp_path, budget_bytes=None)
    slot = first.put(noise(100))
    with start_python(WAIT, str(tmp_path)) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        theirs = Path(child.stdout.readline().strip())
        assert theirs.name.startswith(f"asteria-child-{child.pid}-")
        NvmeTier(tmp_path, budget_bytes=None).close()
        assert theirs.exists()
        assert (read(first, slot) == noise(100)).all()
        child.stdin.close()
    assert child.returncode == 0
    assert not theirs.exists(), "it went at the exit of the interpreter"
    first.close()
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_left_is_reclaimed(tmp_path: Path) -> None:
    with start_python(WAIT, str(tmp_path)) as child:
        assert child.stdout is not None
        theirs = Path(child.stdout.readline().strip())
        child.send_signal(signal.SIGKILL)
    assert (theirs / "0").exists()
    tier = NvmeTier(tmp_path, budget_bytes=None)
    assert list(tmp_path.iterdir()) == [tier.path]
    tier.close()


def test_an_exception_that_ends_training_removes_the_folder(tmp_path: Path) -> None:
    with start_python(RAISE + "\n", str(tmp_path)) as child:
        assert child.stdout is not None
        assert child.stdout.readline().strip()
    assert child.returncode == 1
    assert not list(tmp_path.iterdir())


def test_several_processes_may_begin_at_once(tmp_path: Path) -> None:
    children = [start_python(WAIT, str(tmp_path)) for _ in range(3)]
    paths = set()
    for child in children:
        assert child.stdout is not None
        paths.add(Path(child.stdout.readline().strip()))
    assert set(tmp_path.iterdir()) == paths
    assert len(paths) == 3
    for child in children:
        child.communicate("")
        assert child.returncode == 0
    assert not list(tmp_path.iterdir())


def test_what_is_not_ours_is_not_touched(tmp_path: Path) -> None:
    ours = "asteria-rank0-1-0123456789abcdef"
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "asteria.lock").touch()  # our lock, not our name
    (tmp_path / ours).mkdir()
    (tmp_path / ours / "precious").touch()  # our name, not our lock
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "asteria.lock").touch()
    (tmp_path / ours.replace("rank0", "rank1")).symlink_to(tmp_path / "elsewhere")
    (tmp_path / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    RunFolder(tmp_path, "rank0").remove()
    assert sorted(tmp_path.rglob("*")) == before


def test_a_left_folder_is_removed_without_following_links(tmp_path: Path) -> None:
    left = tmp_path / "run" / "asteria-rank0-1-0123456789abcdef"
    left.mkdir(parents=True)
    for name in ("asteria.lock", "0"):
        (left / name).touch()
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").touch()
    (left / "link").symlink_to(outside)
    RunFolder(tmp_path / "run", "rank0").remove()
    assert not list((tmp_path / "run").iterdir())
    assert (outside / "precious").exists()


@pytest.mark.parametrize("label", ["", "a/b", "\0"])
def test_labels_that_are_no_part_of_a_name_are_refused(tmp_path: Path, label: str) -> None:
    with pytest.raises(ConfigError, match="label"):
        RunFolder(tmp_path, label)


def test_paths_that_are_no_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/asteria")):
        with pytest.raises(ConfigError, match="nvme_path: cannot make .* local disk"):
            NvmeTier(path, budget_bytes=None)


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_fork_leaves_its_parents_folder_alone(tmp_path: Path) -> None:
    tier = NvmeTier(tmp_path, budget_bytes=None)
    slot = tier.put(noise(100))
    slot.wait()
    child = os.fork()
    if child == 0:
        try:
            tier.drop(slot)
            try:
                tier.put(noise(100))
            except StoreError as error:
                good = "fork" in str(error)
            else:
                good = False
            tier.close()
            tier._folder.remove()
            os._exit(0 if good else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert (read(tier, slot) == noise(100)).all()
    tier.close()
    assert not list(tmp_path.iterdir())


def test_a_late_write_does_not_leave_a_folder_that_nobody_removes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, late = RunFolder(tmp_path, "rank0"), [True]
    rmdir = Path.rmdir

    def write_late(path: Path) -> None:
        if late.pop():
            (path / "late").touch()
        rmdir(path)

    monkeypatch.setattr(Path, "rmdir", write_late)
    folder.remove()
    assert (folder.path / "late").exists()
    monkeypatch.undo()
    RunFolder(tmp_path, "rank0").remove()
    assert not list(tmp_path.iterdir())
