"""Programs of several ranks end, whether all have done their part or one of them is lost."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed import leaving

LIMIT_S = 0.75 * leaving.TIMEOUT_S
"""Nobody waits for the timeout of the group."""


def _told_in_time(rank: subprocess.Popen[str]) -> str:
    try:
        return rank.communicate(timeout=LIMIT_S)[1]
    except subprocess.TimeoutExpired:
        rank.send_signal(signal.SIGABRT)
        return f"still running, at {rank.communicate()[1]}"


@pytest.mark.slow
@pytest.mark.parametrize(("how", "codes"), [("done", [0, 0]), ("lost", [1, 7])])
def test_every_interpreter_ends(how: str, codes: list[int], tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    path = f"{root}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    ranks = [
        subprocess.Popen(
            [
                sys.executable,
                "-X",
                "faulthandler",
                "-m",
                leaving.__name__,
                str(rank),
                str(tmp_path / "store"),
                how,
            ],
            cwd=root,
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        told = [_told_in_time(rank) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert [rank.returncode for rank in ranks] == codes, told
    if how == "lost":
        assert "asteria.errors.CoherenceError: " in told[0]
        assert "rank 1 is gone" in told[0]
