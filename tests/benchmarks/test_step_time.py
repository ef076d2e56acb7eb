from __future__ import annotations

import json
import sys

import pytest
import torch

from benchmarks import contenders, measurement, step_time
from benchmarks.contenders import BARE, BUILDERS, OURS, PEERS, Contender, Workload
from benchmarks.shapes import ShapeTable, count_parameters
from benchmarks.step_time import Gradients, Measured

SHAPES = ((6, 4), (4,))


@pytest.fixture
def workload() -> Workload:
    table = ShapeTable(
        name="tiny", embeddings=((9, 4),), layer=SHAPES, layers=2, rest=(), max_precond_dim=8
    )
    return Workload(table=table, period=3, max_precond_dim=8)


class Recorder:
    """A contender that notes when it was stepped and on what."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.target = torch.zeros(2)
        self.seen: list[torch.Tensor] = []
        self.log = log
        self.entry = Contender(name=name, settings="", step=self.step, inputs=[self.target])

    def step(self) -> None:
        self.log.append(self.entry.name)
        self.seen.append(self.target.clone())


# The shared measurements.


@pytest.mark.parametrize(
    ("fraction", "expected"), [(0.0, 1.0), (0.5, 2.5), (1.0, 4.0), (0.25, 1.75), (0.99, 3.97)]
)
def test_quantiles_are_linear_between_order_statistics(fraction: float, expected: float) -> None:
    assert measurement.quantile([3.0, 1.0, 4.0, 2.0], fraction) == pytest.approx(expected)


@pytest.mark.parametrize(("values", "fraction"), [([], 0.5), ([1.0], 1.1), ([1.0], -0.1)])
def test_a_quantile_that_does_not_exist_is_refused(values: list[float], fraction: float) -> None:
    with pytest.raises(ValueError, match="quantile"):
        measurement.quantile(values, fraction)


def test_a_summary_tells_mean_quantiles_and_extremes() -> None:
    values = [float(value) for value in range(101)]
    assert measurement.summarize(values) == pytest.approx(
        {"mean": 50, "min": 0, "p10": 10, "p50": 50, "p90": 90, "p99": 99, "max": 100}
    )


def test_tables_align_numbers_right_and_words_left() -> None:
    text = measurement.format_table(("name", "ms", "note"), [("a", "1.5", "x y"), ("bcd", "-", "")])
    assert text.splitlines() == [
        "name   ms  note",
        "----  ---  ----",
        "a     1.5  x y",
        "bcd     -",
    ]


def test_the_machine_is_described_with_versions() -> None:
    machine = measurement.describe_machine(("no-such-package",))
    assert machine["threads"] == torch.get_num_threads()
    assert machine["cores"] >= 1
    assert machine["versions"]["torch"] == measurement.version("torch")
    assert machine["versions"]["no-such-package"] is None
    json.dumps(machine)


def test_json_replaces_the_file_whole(tmp_path) -> None:
    path = tmp_path / "new" / "report.json"
    measurement.write_json(path, {"a": 1})
    measurement.write_json(path, {"a": [2.5]})
    assert json.loads(path.read_text()) == {"a": [2.5]}
    assert [entry.name for entry in path.parent.iterdir()] == ["report.json"]


# The alternation.


def test_contenders_alternate_in_rotated_order_on_the_same_gradients() -> None:
    log: list[str] = []
    recorders = [Recorder(name, log) for name in "abc"]
    gradients = Gradients([(2,)], seed=0)
    entries = [recorder.entry for recorder in recorders]
    results = step_time.measure(entries, gradients, steps=3, warmup=2)
    assert "".join(log) == "bca" + "cab" + "abc" + "bca" + "cab"
    assert all(len(result.times_ms) == 3 for result in results.values())
    first, *others = ([tensor.tolist() for tensor in recorder.seen] for recorder in recorders)
    assert all(other == first for other in others)
    assert len({tuple(tensor) for tensor in first}) == 5


def test_gradients_are_set_again_when_an_optimizer_drops_them() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    buffer = torch.zeros(2)

    def step() -> None:
        assert parameter.grad is buffer
        parameter.grad = None

    entry = Contender(name="drops", settings="", step=step, inputs=[buffer], parameters=[parameter])
    assert entry.timed_step([torch.ones(2)]) >= 0
    entry.timed_step([torch.full((2,), 3.0)])
    assert buffer.tolist() == [3.0, 3.0]


def test_a_refresh_is_seen_where_the_basis_changes() -> None:
    basis = torch.linalg.qr(torch.randn(4, 4)).Q
    state = {"step": 1, "factors": [torch.ones(4, 4)], "bases": ([], [torch.ones(3), basis])}
    assert step_time.find_basis(state) == ("bases", 1, 1)
    assert step_time.find_basis({"factors": torch.ones(4, 4), "none": None}) is None

    entry = Recorder("a", [])
    entry.entry.state = state
    stepped: list[int] = []

    def step() -> None:
        stepped.append(1)
        if len(stepped) in (2, 4, 5):
            basis.copy_(basis[:, [1, 2, 3, 0]].clone())

    entry.entry.step = step
    gradients = Gradients([(2,)], seed=0)
    results = step_time.measure([entry.entry], gradients, steps=4, warmup=2)
    assert results["a"].refresh_steps == [1, 2]


def test_settling_ends_with_the_first_period_without_a_compilation(monkeypatch) -> None:
    recorder = Recorder("a", [])
    monkeypatch.setattr(
        step_time,
        "compiled_graphs",
        lambda: min(len(recorder.seen), 7),  # the 7th step compiles
    )
    step_time.settle(recorder.entry, Gradients([(2,)], seed=0), period=3)
    assert len(recorder.seen) == 12


# The report.


def measured(**times_ms: list[float]) -> dict[str, Measured]:
    names = {"ours": OURS, "bare": BARE, "peer": PEERS[0], "other": PEERS[1], "asked": PEERS[3]}
    return {names[key]: Measured(settings="s", times_ms=times) for key, times in times_ms.items()}


def test_ratios_take_the_faster_peer_by_mean_and_the_bare_products_by_median() -> None:
    results = measured(
        ours=[2.0, 2.0, 8.0], peer=[1.0, 1.0, 100.0], other=[5.0, 5.0, 5.0], bare=[1.0, 1.6, 9.0]
    )
    found = step_time.ratios(results)
    assert found["mean / faster peer's mean"] == {"value": pytest.approx(0.8), "against": PEERS[1]}
    assert found["median / bare products' median"]["value"] == pytest.approx(1.25)


def test_what_users_have_to_ask_for_is_told_apart() -> None:
    found = step_time.ratios(measured(ours=[2.0], peer=[4.0], asked=[2.5]))
    assert found["mean / faster peer's mean"]["against"] == PEERS[3]
    same = {"value": pytest.approx(0.5), "against": PEERS[0]}
    assert found["mean / mean of those as they come"] == same


def test_a_processor_that_changes_its_speed_changes_no_ratio_of_rounds() -> None:
    found = step_time.ratios(
        measured(ours=[1.5, 3.0, 1.5, 3.0, 3.0], bare=[1.0, 2.0, 1.0, 2.0, 1.0])
    )
    assert found["median of the ratios of all rounds"]["value"] == pytest.approx(1.5)
    assert found["median / bare products' median"]["value"] == pytest.approx(3.0)


def test_ratios_are_left_out_where_nothing_was_measured() -> None:
    assert list(step_time.ratios(measured(ours=[1.0], bare=[1.0]))) == [
        "median / bare products' median",
        "median of the ratios of all rounds",
    ]
    assert step_time.ratios(measured(peer=[1.0], bare=[1.0])) == {}


def test_the_table_names_what_is_not_installed() -> None:
    text = step_time.results_table(measured(ours=[1.25, 1.25]), {PEERS[1]: "not installed"})
    header, _, ours, peer = text.splitlines()
    assert header.split()[:3] == ["step()", "in", "ms"]
    assert ours.split() == [OURS, "1.2", "1.2", "1.2", "1.2", "-", "s"]
    assert peer.startswith(PEERS[1])
    assert peer.endswith("not installed")


def test_a_missing_peer_is_reported_and_the_others_run(monkeypatch, workload) -> None:
    monkeypatch.setitem(sys.modules, "heavyball", None)
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    names = [*PEERS, "torch AdamW"]
    gradients = Gradients(workload.table.shapes(), 0)
    entries, missing = step_time.enter_contenders(workload, gradients, names)
    assert [entry.name for entry in entries] == ["torch AdamW"]
    assert missing == dict.fromkeys(PEERS, "not installed")


@pytest.mark.parametrize("name", ["torch AdamW", *contenders.COMPILED])
def test_only_a_compiled_peer_may_fail(monkeypatch, workload, name: str) -> None:
    def build(*_arguments: object) -> Contender:
        raise RuntimeError("no compiler")

    monkeypatch.setitem(BUILDERS, name, build)
    gradients = Gradients(workload.table.shapes(), 0)
    if name in contenders.COMPILED:
        entries, missing = step_time.enter_contenders(workload, gradients, [name])
        assert (entries, missing) == ([], {name: "does not compile here: RuntimeError"})
    else:
        with pytest.raises(RuntimeError, match="no compiler"):
            step_time.enter_contenders(workload, gradients, [name])


# The contenders.


def test_the_bare_products_are_six_for_two_sides_and_three_for_one(monkeypatch, workload) -> None:
    entry = contenders.bare_products(workload, [])
    shapes = workload.table.shapes()
    entry.load([torch.full(shape, float(index)) for index, shape in enumerate(shapes)])
    multiplied: list[tuple[int, ...]] = []
    bmm = torch.bmm

    def counted(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        multiplied.append((*left.shape, right.shape[-1]))
        return bmm(left, right)

    monkeypatch.setattr(torch, "bmm", counted)
    entry.step()
    one_sided = [(1, 9, 4, 4), (1, 9, 4, 4), (1, 4, 9, 4)]
    two_sided = [(2, 6, 6, 4), (2, 6, 4, 4)] * 2 + [(2, 6, 4, 6), (2, 4, 6, 4)]
    assert multiplied == one_sided + two_sided


def test_the_bare_products_stack_the_gradients_of_equal_shapes(workload) -> None:
    entry = contenders.bare_products(workload, [])
    assert [None if target is None else tuple(target.shape) for target in entry.inputs] == [
        (9, 4),
        (6, 4),
        None,
        (6, 4),
        None,
    ]
    entry.load([torch.full(shape, float(n)) for n, shape in enumerate(workload.table.shapes())])
    first, second = entry.inputs[1], entry.inputs[3]
    assert first is not None
    assert second is not None
    assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    assert (first[0, 0].item(), second[0, 0].item()) == (1.0, 3.0)


@pytest.mark.parametrize("name", [OURS, "asteria.KLShampoo", "torch AdamW", *PEERS[:2]])
def test_an_optimizer_trains_its_own_parameters(workload, name: str) -> None:
    if name in PEERS:
        pytest.importorskip(name.split()[0])
    gradients = Gradients(workload.table.shapes(), 0)
    buffers = [torch.zeros_like(tensor) for tensor in gradients.tensors]
    entry = BUILDERS[name](workload, buffers)
    other = BUILDERS[name](workload, buffers)
    before = [parameter.detach().clone() for parameter in entry.parameters]
    results = step_time.measure([entry], gradients, steps=6, warmup=4)
    assert count_parameters(p.shape for p in entry.parameters) == workload.table.parameters()
    assert all(p.dtype == torch.float32 for p in entry.parameters)
    assert all(not torch.equal(p, q) for p, q in zip(entry.parameters, before, strict=True))
    assert all(torch.equal(p, q) for p, q in zip(other.parameters, before, strict=True))
    refresh_steps = results[name].refresh_steps
    if name == "torch AdamW":
        assert refresh_steps is None
    else:
        assert refresh_steps is not None
        first, second = refresh_steps
        assert second - first == workload.period


def test_counted_steps_are_whole_periods() -> None:
    assert step_time.parse_arguments(["--steps", "21", "--period", "10"]).steps == 30
    assert step_time.parse_arguments([]).steps == 120
    assert step_time.parse_arguments([]).threads == 2


@pytest.mark.parametrize("option", ["--steps", "--period", "--threads"])
def test_an_option_below_one_is_refused(option: str, capsys) -> None:
    with pytest.raises(SystemExit):
        step_time.parse_arguments([option, "0"])
    assert f"{option} must be at least 1, found 0" in capsys.readouterr().err


def test_the_program_prints_a_table_and_writes_report_and_plot(
    monkeypatch, tmp_path, capsys, workload
) -> None:
    monkeypatch.setattr(step_time, "TABLES", {"tiny": workload.table})
    names = [OURS, "torch AdamW", BARE]
    monkeypatch.setattr(step_time, "BUILDERS", {name: BUILDERS[name] for name in names})
    path = tmp_path / "step_time.json"
    threads = str(torch.get_num_threads())
    step_time.main(
        ["--table", "tiny", "--max-parameters", "70", "--max-precond-dim", "5", "--steps", "2"]
        + ["--period", "2", "--threads", threads, "--json", str(path)]
    )
    printed = capsys.readouterr().out
    assert "median / bare products' median" in printed
    report = json.loads(path.read_text())
    assert list(report["contenders"]) == names
    assert all(len(entry["times_ms"]) == 2 for entry in report["contenders"].values())
    assert report["contenders"][OURS]["refresh_steps"] is not None
    assert len(report["contenders"][OURS]["refresh_steps"]) == 1
    assert report["settings"]["table"] == "tiny"
    assert report["settings"]["max_precond_dim"] == 5
    assert report["settings"]["shapes"] == [[[9, 4], 1], [[6, 4], 1], [[4], 1]]
    assert report["machine"]["versions"]["torch"]
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        assert "matplotlib is not installed" in printed
    else:
        assert path.with_suffix(".png").stat().st_size > 1000


def test_without_matplotlib_only_a_note_is_printed(monkeypatch, tmp_path, capsys) -> None:
    from benchmarks.step_time_plot import plot

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    plot({}, tmp_path / "x.png")
    assert "matplotlib is not installed" in capsys.readouterr().out
    assert not (tmp_path / "x.png").exists()
