"""The logic of `benchmarks.streaming`, in miniature."""

import json
from pathlib import Path

import pytest

from benchmarks import streaming

TINY = ["--side", "16", "--matrices", "8", "--steps", "2", "--mib", "1", "--depth", "2"]


def test_both_tables_are_made_and_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report_file = tmp_path / "streaming.json"
    options = ["--rounds", "2", "--budget", "0", "--path", str(tmp_path)]
    streaming.main([*TINY, *options, "--json", str(report_file)])
    text = capsys.readouterr().out
    assert "peak growth of the process" in text
    assert "what streaming adds" in text
    assert report_file.with_suffix(".md").read_text(encoding="utf-8") in text
    report = json.loads(report_file.read_text(encoding="utf-8"))
    memory, speed = report["memory"], report["speed"]
    assert memory["found_bytes"].keys() == memory["predicted_bytes"].keys() == {"device", "nvme"}
    assert memory["found_bytes"]["nvme"] > 0
    assert len(speed["rounds"]) == 2
    for turn in speed["rounds"]:
        assert turn["away_s"] > 0
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == [], "nothing is left behind"


def test_a_table_can_be_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    streaming.main([*TINY, "--rounds", "1", "--only", "speed", "--path", str(tmp_path)])
    assert "peak growth" not in capsys.readouterr().out
