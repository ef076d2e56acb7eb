"""The sharded example through torchrun: trains, saves, and continues on another number of ranks."""

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "train_fsdp.py"


def launch(launcher: list[str], out: Path, text: Path, **variables: str) -> str:
    """What rank 0 prints."""
    command = [*launcher, str(SCRIPT), "--out", str(out), "--text", str(text)]
    path = f"{SCRIPT.parents[1]}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | variables
    done = subprocess.run(
        [*command, "--steps", "3", "--save-every", "2"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def losses(printed: str) -> dict[str, float]:
    return {step: float(loss) for step, loss in re.findall(r"step (\d+): loss ([\d.]+)", printed)}


@pytest.mark.slow
def test_a_stopped_run_continues_on_another_number_of_processes(tmp_path: Path) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 40)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    printed = launch([*torchrun, "--nproc-per-node", "2"], out, text)
    whole = losses(printed)
    assert list(whole) == ["1", "2", "3"]
    assert {"exact", "rank 0", "rank 1"} <= set(re.findall(r"exact|rank [01]", printed))
    shutil.rmtree(out / "step-3")
    # What torchrun tells a single process.
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    resumed = losses(launch([sys.executable], out, text, MASTER_PORT=free_port(), **alone))
    assert resumed == {"3": pytest.approx(whole["3"], abs=2e-3)}, "up to the order of sums"
