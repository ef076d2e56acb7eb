"""Traces can be read by Chrome's viewer and Perfetto, whatever happens to the run."""

import gc
import json
import os
import subprocess
import sys
import threading
import warnings
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from asteria.errors import ConfigError
from asteria.telemetry import trace as module
from asteria.telemetry.trace import Trace

BATCH = module._BATCH


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "trace.json"


def parse(text: str) -> list[dict[str, Any]]:
    """Events, as the viewers read them: the closing bracket may be missing."""
    return json.loads(text if text.rstrip().endswith("]") else text + "]")


def spans(path: Path) -> list[dict[str, Any]]:
    return [event for event in parse(path.read_text()) if event["ph"] == "X"]


def names(path: Path) -> list[str]:
    return [event["name"] for event in spans(path)]


def add(trace: Trace, name: str, count: int) -> None:
    for index in range(count):
        trace.span("training", name, index, index + 1)


def test_a_span_has_its_times_in_microseconds_to_the_nanosecond(path: Path) -> None:
    trace = Trace(path)
    start_ns = 12_345_678_901_234_567_089
    trace.span("training", "step", start_ns, start_ns + 1_002_003, step=7, loss=0.5, why="due")
    trace.close()
    text = path.read_text()
    assert '"ts":12345678901234567.089,"dur":1002.003,' in text
    (event,) = [event for event in json.loads(text) if event["ph"] == "X"]
    assert event["name"] == "step"
    assert event["pid"] == os.getpid()
    assert event["args"] == {"step": 7, "loss": 0.5, "why": "due"}


def test_a_clock_that_went_back_makes_no_negative_duration(path: Path) -> None:
    trace = Trace(path)
    trace.span("training", "step", 2000, 1000)
    trace.close()
    assert spans(path)[0]["dur"] == 0


def test_lanes_are_named_rows_in_the_order_of_their_first_span(path: Path) -> None:
    trace = Trace(path)
    for lane in ("training", "worker 1", "training", "worker 0"):
        trace.span(lane, f"in {lane}", 1000, 2000)
    trace.flush()
    trace.span("worker 1", "in worker 1", 3000, 4000)
    trace.close()
    events = json.loads(path.read_text())
    described = [(e["name"], e["tid"], e["args"]) for e in events if e["ph"] == "M"]
    assert described == [
        ("process_name", 0, {"name": "asteria"}),
        ("thread_name", 1, {"name": "training"}),
        ("thread_sort_index", 1, {"sort_index": 1}),
        ("thread_name", 2, {"name": "worker 1"}),
        ("thread_sort_index", 2, {"sort_index": 2}),
        ("thread_name", 3, {"name": "worker 0"}),
        ("thread_sort_index", 3, {"sort_index": 3}),
    ]
    rows = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert len(spans(path)) == 5
    assert all(e["name"] == f"in {rows[e['tid']]}" for e in spans(path))


def test_texts_and_values_that_json_does_not_know(path: Path) -> None:
    trace = Trace(path)
    trace.span('a "lane"\n', "Größe\\", 0, 1, note="]\n", nan=float("nan"), inf=float("-inf"), n=3)
    trace.span("lane", "numpy", 0, 1, value=np.float32(0.5))  # type: ignore[arg-type]
    trace.close()
    first, second = spans(path)
    assert first["name"] == "Größe\\"
    assert first["args"] == {"note": "]\n", "nan": "nan", "inf": "-inf", "n": 3}
    assert second["args"] == {"value": "0.5"}
    assert json.loads(path.read_text())[1]["args"] == {"name": 'a "lane"\n'}


def test_the_file_can_be_read_at_any_time(path: Path) -> None:
    trace = Trace(path)
    assert names(path) == []
    trace.span("training", "one", 0, 1)
    assert names(path) == []
    trace.flush()
    assert names(path) == ["one"]
    trace.flush()
    trace.span("training", "two", 1, 2)
    trace.flush()
    assert names(path) == ["one", "two"]
    assert not path.read_text().rstrip().endswith("]")
    trace.close()
    assert [event["name"] for event in json.loads(path.read_text())[3:]] == ["one", "two"]


def test_full_batches_are_written_without_a_flush(path: Path) -> None:
    trace = Trace(path)
    for index in range(BATCH + 1):
        trace.span("training", str(index), index, index + 1)
    assert names(path) == [str(index) for index in range(BATCH)]
    trace.close()
    assert names(path) == [str(index) for index in range(BATCH + 1)]


def test_threads_lose_nothing_and_keep_their_order(path: Path) -> None:
    trace = Trace(path)
    count, lanes = 3 * BATCH, ["a", "b", "c", "d"]
    together = threading.Barrier(len(lanes), timeout=60)

    def work(lane: str) -> None:
        together.wait()
        for index in range(count):
            trace.span(lane, lane, index * 1000, index * 1000 + 500)

    threads = [threading.Thread(target=work, args=(lane,)) for lane in lanes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    trace.close()
    for lane in lanes:
        assert [event["ts"] for event in spans(path) if event["name"] == lane] == list(range(count))


def test_a_thread_does_not_wait_for_another_that_writes(path: Path) -> None:
    trace = Trace(path)
    with trace._writer._lock:
        for index in range(BATCH + 5):
            trace.span("training", str(index), index, index + 1)
    assert names(path) == []
    trace.span("training", "last", 0, 1)
    assert len(names(path)) == BATCH + 6
    trace.close()


def test_closing_again_and_spans_that_come_late_do_nothing(path: Path) -> None:
    trace = Trace(path)
    trace.span("training", "step", 0, 1)
    trace.close()
    text = path.read_text()
    for index in range(2 * BATCH + 1):
        trace.span("worker", "late", index, index + 1)
    trace.flush()
    trace.close()
    assert path.read_text() == text
    assert len(trace._spans) < BATCH


def test_a_trace_that_nobody_refers_to_is_completed(path: Path) -> None:
    trace = Trace(path)
    trace.span("training", "step", 0, 1)
    del trace
    gc.collect()
    assert [event["name"] for event in json.loads(path.read_text())[3:]] == ["step"]


@pytest.mark.parametrize("end", ["", "raise SystemExit(3)", "raise ValueError"])
def test_a_run_that_ends_leaves_a_complete_file(path: Path, end: str) -> None:
    program = (
        "import sys; from asteria.telemetry.trace import Trace; trace = Trace(sys.argv[1])\n"
        f"trace.span('training', 'step', 0, 1)\n{end}"
    )
    command = [sys.executable, "-W", "error", "-c", program, str(path)]
    subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, check=False)
    assert [event["name"] for event in json.loads(path.read_text())[3:]] == ["step"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks are made on POSIX systems")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_does_not_write_even_if_the_lock_was_held(path: Path) -> None:
    trace = Trace(path)
    trace.span("training", "before", 0, 1)
    with trace._writer._lock:
        child = os.fork()
        if not child:
            # Whatever happens, the child must not go on with the tests.
            try:
                for index in range(BATCH + 1):
                    trace.span("training", "child", index, index + 1)
                trace.flush()
                trace.close()
                os._exit(len(trace._spans))
            finally:
                os._exit(99)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert names(path) == []
    trace.span("training", "after", 1, 2)
    trace.close()
    assert names(path) == ["before", "after"]


def test_a_file_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    for place in (tmp_path / "no" / "trace.json", tmp_path):
        with pytest.raises(ConfigError, match="cannot be written .*: give a file in a folder"):
            Trace(place)


def test_a_folder_that_may_not_be_written_is_refused(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*given: object) -> FileIO:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(module, "FileIO", refuse)
    with pytest.raises(ConfigError, match=r"trace.json', which .* \(Permission denied\): give"):
        Trace(path)


def test_an_older_file_is_replaced(path: Path) -> None:
    path.write_text("an older and much longer trace " * 100)
    Trace(path).close()
    assert [event["ph"] for event in json.loads(path.read_text())] == ["M"]


class SmallDisk(FileIO):
    """Has room for so many bytes, and takes at most 100 at once."""

    room_bytes = 0

    def write(self, data: Any, /) -> int:
        size = min(len(data), self.room_bytes, 100)
        if not size:
            raise OSError(28, "No space left on device")
        SmallDisk.room_bytes -= size
        return super().write(data[:size])


def test_a_full_disk_ends_the_trace_with_one_warning(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FileIO", SmallDisk)
    monkeypatch.setattr(SmallDisk, "room_bytes", 1000)
    trace = Trace(path)
    trace.span("training", "fits", 0, 1)
    trace.flush()
    with pytest.warns(RuntimeWarning, match=r"trace.json' ends here, .*No space left") as caught:
        add(trace, "does not", BATCH)
    assert [Path(one.filename).name for one in caught] == [Path(__file__).name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        add(trace, "no more", BATCH)
        trace.flush()
        trace.close()
    assert names(path) == ["fits"], "half an event is taken back"


def test_a_disk_without_room_for_the_first_line_is_refused(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FileIO", SmallDisk)
    monkeypatch.setattr(SmallDisk, "room_bytes", 10)
    with pytest.raises(ConfigError, match="No space left on device"):
        Trace(path)


def test_a_warning_that_raises_leaves_the_trace_usable(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FileIO", SmallDisk)
    monkeypatch.setattr(SmallDisk, "room_bytes", 200)
    trace = Trace(path)
    trace.span("training", "long " * 100, 0, 1)
    with pytest.raises(RuntimeWarning, match="ends here"):
        trace.flush()
    trace.span("training", "step", 0, 1)
    trace.close()
    assert names(path) == []


def test_two_traces_cannot_share_a_file(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    first = Trace(path)
    first.span("a", "b", 0, 1)
    with pytest.raises(ConfigError, match="another optimizer or process is writing"):
        Trace(path)
    first.close()
    assert any(event.get("name") == "b" for event in json.loads(path.read_text()))
    Trace(path).close()
