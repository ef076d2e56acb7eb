"""The logic of `benchmarks.checkpoint`, in miniature."""

import json
from pathlib import Path

import pytest

from benchmarks import checkpoint

TINY = ["--side", "16", "--matrices", "4", "--steps", "1", "--budget", "0"]


@pytest.mark.parametrize("plain", [False, True], ids=["streamed", "plain"])
def test_a_state_is_saved_and_loaded_and_the_figures_are_written(
    plain: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report_file = tmp_path / "checkpoint.json"
    options = ["--path", str(tmp_path), "--json", str(report_file)]
    checkpoint.main([*TINY, *options, *(["--plain"] if plain else [])])
    text = capsys.readouterr().out
    assert "peak growth of the process, load" in text
    assert report_file.with_suffix(".md").read_text(encoding="utf-8") in text
    figures = json.loads(report_file.read_text(encoding="utf-8"))["figures"]
    assert figures["same"]
    assert figures["tiers"]["nvme"] >= figures["state_bytes"] == 6 * 4 * 16 * 16 * 4
    for phase in checkpoint.PHASES:
        assert figures[phase]["seconds"] > 0
        assert figures[phase]["peak_growth"] >= 0
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == [], "nothing is left behind"
