"""What `benchmarks.accelerator` has found, as a text with tables, beside what was hoped for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

MISSING = "not measured"
BESIDE = "asteria, beside, on the device, period"
Outcomes = Mapping[str, Mapping[str, Any]]
Row = Mapping[str, Any]


def _rows(outcomes: Outcomes, section: str) -> list[Row]:
    rows: list[Row] = (outcomes.get(section, {}).get("result") or {}).get("rows", [])
    return rows


def _ms(rows: Sequence[Row], name: str, column: str = "p50") -> float | None:
    """Milliseconds of a step of the arm whose name has this end, or beginning."""
    for row in rows:
        if row["arm"].endswith(name) or row["arm"].startswith(name + ","):
            return float(row["step_ms"][column]) if row.get("step_ms") else None
    return None


def _ratio(above: float | None, below: float | None) -> float | None:
    return None if above is None or not below else above / below


def judge(outcomes: Outcomes) -> list[dict[str, Any]]:
    """Each target with its value; None where it was not measured."""
    training, memory = _rows(outcomes, "training"), _rows(outcomes, "small memory")
    adamw = _ms(training, "AdamW")
    every = [_ms([row], "period 1") for row in training if row["arm"].startswith("asteria")]
    fastest = min((ms for ms in every if ms is not None), default=None)
    tenth, slowest = _ms(training, f"{BESIDE} 10"), _ms(training, f"{BESIDE} 10", "p99")
    within = [row for row in memory if "within" in row["arm"] and row.get("reserved_bytes")]
    memory_bytes = within[0]["reserved_bytes"] if within else None
    waits = (outcomes.get("synchronization", {}).get("result") or {}).get("waits", {})
    measured = adamw is not None
    beside = next((why for place, why in waits.items() if "beside" in place), None)
    return [
        _target(
            "SOAP with period 1 / fused AdamW, 124M, median step", _ratio(fastest, adamw), 1.25
        ),
        _target("p99 / p50 of a step with period 10, on the device", _ratio(slowest, tenth), 1.05),
        _target("1B model, GB of device memory", memory_bytes and memory_bytes / 1e9, 24.0),
        _target(
            "1B model within 24 GB / all on the device, median step",
            _ratio(
                _ms(memory, "within 24 GB"),
                _ms(memory, "all on the device"),
            ),
            1.15,
        ),
        _target(
            "operations of a step that wait for the device",
            float(beside is not None) if measured and waits else None,
            0.0,
        ),
    ]


def _target(name: str, value: float | None, most: float) -> dict[str, Any]:
    met = None if value is None else value <= most
    return {"name": name, "value": value, "most": most, "met": met}


def markdown(report: Mapping[str, Any]) -> str:
    """The whole text."""
    return "\n".join(_lines(report)) + "\n"


def _lines(report: Mapping[str, Any]) -> Iterator[str]:
    device, machine = report["device"], report["machine"]
    yield f"# {device['name']}"
    yield ""
    if report["measured"]:
        memory = device["memory_bytes"] / 1e9
        yield f"{memory:.0f} GB, CUDA {device['cuda']}; {machine['cpu']}, {machine['cores']} cores."
    else:
        yield (
            "There was no accelerator: the sections ran on a tiny model with the host in its "
            f'place, so that what they do is checked, and every figure is "{MISSING}".'
        )
    yield from ("", "| section | | s |", "|:--|:--|--:|")
    for name, outcome in report["sections"].items():
        yield f"| {name} | {_status(outcome, measured=report['measured'])} | {outcome['seconds']} |"
    yield from ("", "| target | at most | found |", "|:--|--:|--:|")
    for target in report["targets"]:
        yield f"| {target['name']} | {target['most']:g} | {_found(target)} |"
    for section in ("training", "peers", "largest", "small memory"):
        yield from _training(report["sections"], section)
    yield from _refreshes(report["sections"])
    yield from _rest(report["sections"])


def _status(outcome: Mapping[str, Any], *, measured: bool) -> str:
    if outcome["status"] != "done":
        last = (outcome.get("error") or "").strip().splitlines()
        return f"{outcome['status']}: {last[-1]}" if last else outcome["status"]
    return "measured" if measured else "checked, not measured"


def _found(target: Mapping[str, Any]) -> str:
    if target["value"] is None:
        return MISSING
    return f"{target['value']:.2f}, {'met' if target['met'] else 'MISSED'}"


def _training(outcomes: Outcomes, section: str) -> Iterator[str]:
    rows = _rows(outcomes, section)
    if not rows:
        return
    result = outcomes[section]["result"]
    yield from ("", f"## {section}: {result['model']}, {result['tokens']} tokens a step", "")
    yield "| | p50 ms | p99 | max | steps | tokens/s | peak GB | J/step | of AdamW's | MB moved |"
    yield "|:--|--:|--:|--:|--:|--:|--:|--:|--:|--:|"
    adamw = next((row.get("joules_per_step") for row in rows if "AdamW" in row["arm"]), None)
    for row in rows:
        yield f"| {row['arm']} | {' | '.join(_cells(row, adamw))} |"


def _cells(row: Row, adamw_joules: float | None) -> list[str]:
    if "error" in row:
        return [f"failed: {row['error'].splitlines()[0]}", *[""] * 8]
    if not row.get("step_ms"):
        return [MISSING] * 3 + [str(row["steps"])] + [MISSING] * 5
    step, joules = row["step_ms"], row["joules_per_step"]
    moved = sum(row["moved_bytes_per_step"].values())
    share = _ratio(joules, adamw_joules)
    return [
        *(f"{step[column]:.1f}" for column in ("p50", "p99", "max")),
        str(row["steps"]),
        f"{row['tokens_per_s']:.0f}",
        f"{row['peak_bytes'] / 1e9:.2f}",
        MISSING if joules is None else f"{joules:.0f}",
        MISSING if share is None else f"{share:.2f}",
        f"{moved / 1e6:.1f}",
    ]


def _refreshes(outcomes: Outcomes) -> Iterator[str]:
    rows: list[Row] = (outcomes.get("refreshes", {}).get("result") or {}).get("rows", [])
    if not rows:
        return
    yield from ("", "## refreshes", "", "| n | method | in a stack of | ms | each, ms |")
    yield "|--:|:--|--:|--:|--:|"
    for row in rows:
        ms = row["ms"]
        told = row.get("error", MISSING).splitlines()[0] if ms is None else f"{ms:.2f}"
        each = "" if ms is None else f"{ms / row['blocks']:.3f}"
        yield f"| {row['size']} | {row['method']} | {row['blocks']} | {told} | {each} |"


def _rest(outcomes: Outcomes) -> Iterator[str]:
    tests = outcomes.get("tests", {}).get("result")
    if tests:
        yield from ("", "## tests", "", tests["summary"])
    waits = (outcomes.get("synchronization", {}).get("result") or {}).get("waits")
    if waits:
        yield from ("", "## what makes the host wait", "")
        for place, why in waits.items():
            yield f"- refreshes {place}: {why or 'nothing'}"
    table = (outcomes.get("link", {}).get("result") or {}).get("table")
    if table:
        yield from ("", "## link", "", "| MiB | way | GB/s | of a bare copy |", "|--:|:--|--:|--:|")
        for mib, ways in table.items():
            for way, found in ways.items():
                yield (
                    f"| {mib} | {way} | {found['ours']['p50']:.1f} | {found['ratio']['p50']:.2f} |"
                )
