from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from asteria.distributed.ownership import least_makespan
from asteria.distributed.spread import Speed
from asteria.distributed.topology import Link
from asteria.planner.machine import Machine, save_machine
from asteria.planner.measurements import Probe
from benchmarks import scale
from benchmarks.scale_arms import Arm, Ranks, Where, arms, run
from benchmarks.scale_model import (
    ADAMW_BYTES,
    NETWORKS,
    TRAININGS,
    Cluster,
    TileWork,
    Training,
    Workload,
    workload,
)

NETWORK = NETWORKS["infiniband"]
SIZES = (256, 128, 128, 64, 64, 64, 32, 32)
TILES = tuple(TileWork((n, 64), 1, n * 64, place) for place, n in enumerate(SIZES))
REPLICAS = Arm(name="replicas", where=Where.HOST, staleness=2)
SHARDS = dataclasses.replace(REPLICAS, name="shards", update_owned=True, sharded=True)
SIXTEEN = tuple(dataclasses.replace(TILES[0], parameter=place) for place in range(16))
ELEMENTS = sum(tile.elements for tile in TILES)


def small(batch_tokens: int = 4096, *, sharded: bool = False) -> Workload:
    """Eight tiles, and as many parameters without a factor."""
    training = Training(model="small", batch_tokens=batch_tokens, sharded=sharded)
    return Workload(training, 2 * ELEMENTS, 2 * ELEMENTS, TILES)


def ranks(count: int, work: Workload | None = None, **cluster: Any) -> Ranks:
    return Ranks(work or small(), count, Cluster(**cluster), NETWORK)


def step_s(found: Mapping[str, Any]) -> float:
    return float(found["step_s"])


# The model.


@pytest.mark.parametrize("training", TRAININGS.values(), ids=TRAININGS)
def test_models_are_divided_as_the_planner_does(training: Training) -> None:
    work = workload(training)
    sizes = {"olmo-2-1b": 1.48e9, "olmo-2-7b": 7.30e9, "llama-2-70b": 68.98e9}
    assert work.parameters == pytest.approx(sizes[training.model], rel=0.01)
    assert 0 < work.plain < 0.01 * work.parameters
    assert max(n for tile in work.tiles for n in tile.sizes) <= training.options.get(
        "max_precond_dim", 10000
    )


def test_owners_stay_near_the_bound_on_any_number_of_ranks() -> None:
    work = workload(TRAININGS["olmo-2-7b"])
    costs = [tile.load.cost for tile in work.tiles]
    for count in (8, 64):
        here = Ranks(work, count, Cluster(), NETWORK)
        assert here.most(REPLICAS, lambda tile: tile.load.cost) <= 1.05 * least_makespan(
            costs, count
        )


def test_one_rank_is_the_same_in_all_ways() -> None:
    here = ranks(1)
    found = [run(here, arm, period=4) for arm in arms(False, [0])]
    assert len({step_s(row) for row in found[1:]}) == 1
    beside = [run(here, a, period=4) for a in arms(False, [2]) if a.where is Where.HOST]
    assert step_s(beside[0]) == step_s(beside[1])


def test_adamw_is_compute_and_memory() -> None:
    found = run(ranks(1), arms(False, [])[0], period=4)
    compute_s = 6 * 2 * ELEMENTS * 4096 / 4e14
    update_s = ADAMW_BYTES * 2 * ELEMENTS / 2.7e12
    assert step_s(found) == pytest.approx(compute_s + update_s, rel=1e-4)
    assert found["wait_s"] == 0.0


def test_communication_counts_where_nothing_hides_it() -> None:
    adamw = arms(False, [])[0]
    idle = ranks(16, small(1))
    nbytes, (near, nodes) = 2 * 2 * ELEMENTS, (8, 2)
    pass_s = NETWORK.intra.seconds(nbytes / near, near - 1)
    pass_s += NETWORK.inter.seconds(nbytes / near / nodes, nodes - 1)
    assert idle.compute_s(adamw) == pytest.approx(2 * pass_s, rel=1e-3)
    busy = ranks(16, small(10**9))
    assert busy.compute_s(adamw) == pytest.approx(6 * 2 * ELEMENTS * 1e9 / 16 / 4e14)
    assert ranks(16, small(10**9), overlap=0.0).compute_s(adamw) == pytest.approx(
        busy.compute_s(adamw) + 2 * pass_s
    )


def test_owners_share_refreshes_and_updates() -> None:
    work = dataclasses.replace(small(), tiles=SIXTEEN)
    whole, shared = ranks(1, work), ranks(8, work)
    _, every, owners, *_ = arms(False, [0])
    assert shared.inside_s(every) == whole.inside_s(every)
    assert shared.inside_s(owners) == pytest.approx(whole.inside_s(owners) / 8)
    assert shared.update_s(every) == whole.update_s(every)
    turned = shared.update_s(owners) - shared.exchange_s(owners)
    assert turned == pytest.approx(whole.update_s(owners) / 8)


def test_replicas_share_factors_only() -> None:
    work = dataclasses.replace(small(), tiles=SIXTEEN)
    shared, cluster = ranks(8, work), Cluster()
    replicas = Arm(name="", where=Where.HOST, staleness=1)
    every = dataclasses.replace(replicas, owned=False)
    fold_s = sum(tile.fold_s(cluster) for tile in work.tiles)
    saved_s = shared.update_s(every) - shared.update_s(replicas)
    assert saved_s == pytest.approx(fold_s * 7 / 8)


def test_results_travel_to_replicas_and_stay_with_owners_of_shards() -> None:
    here = ranks(16)
    host = [arm for arm in arms(False, [2]) if arm.where is Where.HOST]
    replicas, shards = (here.refreshes(arm) for arm in host)
    assert all(way.sending_s > 0 and way.passing_s > 0 for way in replicas)
    assert all(way.sending_s == way.passing_s == 0 for way in shards)
    assert [way.job_s for way in replicas] == [way.job_s for way in shards]
    sent = here.sent_bytes()
    assert sent[Link.INTER] == here.round_bytes
    assert sent[Link.INTRA] == here.round_bytes * 14
    alone = dataclasses.replace(host[0], owned=False)
    assert {way.owner for way in here.refreshes(alone)} == {0}
    assert all(way.sending_s == 0 for way in here.refreshes(alone))


def test_links_that_results_keep_busy_delay_gradients() -> None:
    slow = dataclasses.replace(NETWORK, inter=Speed(1e3))
    here = Ranks(small(), 16, Cluster(), slow)
    host = Arm(name="", where=Where.HOST, staleness=2)
    without = here.compute_s(host)
    found = run(here, host, period=4)
    assert found["compute_s"] > without + here.round_bytes / 8 / 1e3 / 4 * 0.99


def test_nothing_waits_where_there_is_slack_and_all_does_where_there_is_none() -> None:
    def waits(seconds: float, staleness: int) -> float:
        host = Machine(cores=3, training_threads=2, refresh_s=((64, seconds),))
        work = small(10**9)
        arm = next(a for a in arms(False, [staleness]) if a.where is Where.HOST)
        return float(run(ranks(8, work, host=host), arm, period=4)["wait_s"])

    assert waits(1e-6, 1) == 0.0
    assert waits(10.0, 1) > waits(10.0, 3) > 0.0


def test_phases_by_owner_begin_together() -> None:
    def begun(count: int, by_owner: bool) -> int:
        here = Ranks(small(), count, Cluster(), NETWORK, phases_by_owner=by_owner)
        return [way.phase for way in here.refreshes(REPLICAS)].count(0.0)

    assert [begun(8, False), begun(8, True), begun(2, True)] == [1, 8, 2]


def test_shards_of_a_parameter_come_together_at_one_rank() -> None:
    tiles = [dataclasses.replace(TILES[0], parameter=place // 4) for place in range(8)]
    here = ranks(8, dataclasses.replace(small(), tiles=tuple(tiles)))
    assert len(set(here.owners(REPLICAS))) == 8
    assert here.owners(SHARDS) == [0, 0, 0, 0, 1, 1, 1, 1]
    assert here.most(SHARDS, lambda tile: 1.0) == 4.0
    blocks = workload(TRAININGS["olmo-2-1b, blocks of 2048"])
    assert len({tile.parameter for tile in blocks.tiles}) == 114
    assert len(blocks.tiles) == 354


def test_state_is_counted_where_it_is() -> None:
    work = small(sharded=True)
    adamw, every, owners, *rest = arms(True, [0])
    replicas, shards = rest
    bases = sum(tile.basis_bytes for tile in TILES)
    one = {arm.name: ranks(1, work).state_bytes(arm) for arm in (adamw, every, replicas, shards)}
    assert one["AdamW"] == 16 * 2 * ELEMENTS
    assert one[every.name] == one[replicas.name] == one[shards.name] == 32 * ELEMENTS + 2 * bases
    many = ranks(8, work)
    assert many.state_bytes(adamw) == one["AdamW"] / 8
    assert many.state_bytes(every) == one[every.name]
    assert many.state_bytes(shards) < many.state_bytes(owners) < many.state_bytes(replicas)
    assert run(ranks(1, work, device_bytes=1e3), adamw, period=4)["fits"] is False


# The program.


def rows_of(**waits_s: float) -> list[dict[str, Any]]:
    known = {"step_s": 2.0, "ranks": 8, "arm": "Asteria", "fits": True}
    rows = [known | {"staleness": int(s[1:]), "wait_s": wait} for s, wait in waits_s.items()]
    adamw = {"arm": "AdamW", "step_s": 1.0, "staleness": 0, "wait_s": 0.0, "fits": False}
    return [known | adamw, *rows]


def test_tables_show_waits_what_does_not_fit_and_the_staleness_that_is_enough() -> None:
    rows = rows_of(s1=0.5, s2=0.001, s3=0.0)
    text = scale.table(rows, [1, 2])
    assert "| AdamW | - | 1 (1.00)! |" in text
    assert "| Asteria | 1 | 2 (2.00)w |" in text
    assert "| Asteria | 2 | 2 (2.00) |" in text
    assert "| Asteria | 3 |" not in text
    assert text.endswith("| smallest S >= 1 without waits: Asteria | | 2 |")
    assert scale.smallest_staleness(rows_of(s1=0.5), "Asteria", 8) is None


def test_where_others_are_faster_is_said() -> None:
    def row(arm: str, staleness: int, ranks: int, step_s: float) -> dict[str, Any]:
        return {"arm": arm, "staleness": staleness, "ranks": ranks, "step_s": step_s}

    rows = [row(scale.OWNERS, 0, n, 1.0) for n in (1, 2, 4)]
    rows += [row("A", 2, n, step_s) for n, step_s in ((1, 0.9), (2, 1.2), (4, 1.3))]
    rows += [row("A", 1, 4, 9.0), *(row("B", 2, n, 1.001) for n in (1, 2, 4))]
    assert scale.unfavourable(rows, 2) == "- A, S = 2: at 2, 4 ranks\n- B, S = 2: nowhere"
    assert arms(False, [])[2].name == scale.OWNERS


def test_assumptions_come_from_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale, "refresh_cpu_s", lambda: ((64, 0.125),))
    given = ["--inter-gb-per-s", "7", "--node-size", "4", "--host-cores", "10", "--device-gb", "9"]
    args = scale.parse_arguments([*given, "--compute-tflops", "300", "--ranks", "2", "8"])
    cluster, network = scale.cluster_of(args), scale.network_of("ethernet", args)
    assert (cluster.node_size, cluster.device_bytes, cluster.host.free_cores) == (4, 9e9, 8)
    assert cluster.compute_flop_per_s == 3e14
    assert cluster.host.seconds(64, 1, method="qr") == 0.125
    assert network.inter == Speed(7e9, NETWORKS["ethernet"].inter.latency_s)
    assert network.intra == NETWORKS["ethernet"].intra


def test_a_probed_machine_is_taken(tmp_path: Path) -> None:
    save_machine(Machine(refresh_s=((64, 0.25),), math_threads=2), tmp_path / "probe.json")
    cluster = scale.cluster_of(scale.parse_arguments(["--machine", str(tmp_path / "probe.json")]))
    assert cluster.host.seconds(64, 1, method="qr") == 0.5
    assert cluster.host.free_cores == 12
    assert str(tmp_path) not in cluster.host.source


def test_refreshes_are_timed_here(monkeypatch: pytest.MonkeyPatch) -> None:
    class Quick(Probe):
        def __init__(self, **given: Any) -> None:
            super().__init__(**given, sizes=(32,))

    monkeypatch.setattr(scale, "Probe", Quick)
    ((size, seconds),) = scale.refresh_cpu_s()
    assert size == 32
    assert 0 < seconds < 5


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--ranks", "12"], "whole nodes"), (["--staleness", "-1"], "at least 0")],
)
def test_what_cannot_be_is_refused(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        scale.parse_arguments(words)
    assert said in capsys.readouterr().err


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], None]:
    monkeypatch.setattr(scale, "workload", lambda training: small(sharded=training.sharded))
    monkeypatch.setattr(scale, "refresh_cpu_s", lambda: ((64, 0.001),))
    return scale.main


def test_the_program_writes_tables_pictures_and_a_report(
    program: Callable[[list[str]], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "results" / "scale.json"
    words = ["--models", "olmo-2-1b", "olmo-2-7b", "--ranks", "1", "8", "16", "--staleness"]
    program([*words, "0", "2", "--check-ranks", "--json", str(path)])
    printed = capsys.readouterr().out
    assert path.with_suffix(".md").read_text() == printed.removesuffix("\n")
    assert printed.count("Slower than SOAP, owners, updates gathered:") == 4
    assert "400 TFLOP/s in forward and backward" in printed
    assert printed.count("| SOAP, owners, updates gathered | - |") == 4
    report = json.loads(path.read_text())
    rows = report["models"]["olmo-2-7b"]["networks"]["ethernet"]
    assert {row["ranks"] for row in rows} == {1, 8, 16}
    assert {row["staleness"] for row in rows} == {0, 2}
    for picture in (path.with_suffix(".png"), path.with_name("scale_ethernet.png")):
        assert picture.read_bytes().startswith(b"\x89PNG")
