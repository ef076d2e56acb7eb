"""The command line: what it prints, and how it ends."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import asteria
from asteria.cli import probe_command, progress
from asteria.cli.main import main
from asteria.planner.machine import Machine, default_path, load_machine, save_machine
from asteria.planner.measurements import Probe

GPT2 = ["plan", "gpt2"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def as_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    status = main([*arguments, "--json"])
    content: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert status == (0 if content["fits"] else 1)
    return content


def test_a_plan_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*GPT2, "--host-budget", "512MiB", "--nvme-path", "/scratch"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.startswith("gpt2: 124.4 M parameters, soap")
    for text in ("rates: default rates, not measured", "nvme", "a round of refreshes", "768x2304"):
        assert text in out
    table = out.split("\n\n")[1].splitlines()
    places = {
        line.index(shape) for line in table for shape in ("768x2304", "768x3072") if shape in line
    }
    assert len(places) == 1, "columns line up"


def test_a_plan_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    content = as_json(capsys, *GPT2, "--host-memory", "8GiB")
    plan = asteria.plan("gpt2", machine=Machine(host_bytes=2**33))
    assert content["memory"] == plan.to_dict()["memory"]
    assert content["optimizer"] == "soap"


def test_a_plan_with_packed_factors(capsys: pytest.CaptureFixture[str]) -> None:
    full = as_json(capsys, *GPT2)["memory"]
    packed = as_json(capsys, *GPT2, "--factors", "packed")["memory"]
    assert packed["by_class"]["factors"] == pytest.approx(full["by_class"]["factors"] / 2, rel=1e-2)
    assert packed["by_class"]["bases"] == full["by_class"]["bases"]


def test_no_room_ends_with_1_and_says_what_to_change(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*GPT2, "--host-budget", "512MiB"]) == 1
    out = capsys.readouterr().out
    assert "does not fit" in out
    assert "To change:\n  - raise host_budget" in out


def test_options_reach_the_optimizer_the_runtime_and_the_machine(
    capsys: pytest.CaptureFixture[str],
) -> None:
    content = as_json(
        capsys,
        *GPT2,
        *("--optimizer", "klshampoo", "--precondition-frequency", "20", "--max-precond-dim", "512"),
        *("--large-dims", "blocks", "--staleness", "4", "--workers", "8", "--step-time", "2.5"),
        *("--refresh-method", "eigh", "--device-memory", "1GiB", "--host-memory", "2GB"),
        *("--nvme-space", "3TiB", "--nvme-path", "/n", "--cores", "64", "--device-budget", "1MB"),
        *("--host-budget", "2MB", "--nvme-budget", "1TiB"),
    )
    fresh, machine = content["refreshes"], content["machine"]
    assert content["optimizer"] == "kl-shampoo"
    assert (fresh["period"], fresh["staleness"], fresh["jobs"], fresh["step_s"]) == (20, 4, 2, 2.5)
    assert max(map(int, fresh["factors"])) <= 512
    assert content["memory"]["limits"] == {"device": 10**6, "pinned": 2 * 10**6, "nvme": 2**40}
    assert machine["device_bytes"] == 2**30
    assert machine["host_bytes"] == 2 * 10**9
    assert machine["nvme_bytes"] == 3 * 2**40
    assert (machine["cores"], machine["training_threads"]) == (64, None)


def test_more_options(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    content = as_json(capsys, *GPT2, "--refresh", "sync", "--precondition-frequency", "auto")
    assert content["refreshes"]["beside"] is False
    plain = as_json(capsys, *GPT2)["memory"]["state_bytes"]
    more = as_json(capsys, *GPT2, "--precondition-1d", "--merge-dims")["memory"]["state_bytes"]
    assert more > plain
    narrow = as_json(capsys, *GPT2, "--state-dtype", "bfloat16")["memory"]["state_bytes"]
    assert narrow < plain
    aside = as_json(capsys, *GPT2, "--device-memory", "80GB", "--refresh-on", "device")
    assert aside["refreshes"]["places"]["768x3072"] == "device ldlr"
    save_machine(Machine(cores=5), tmp_path / "m.json")
    assert as_json(capsys, *GPT2, "--machine", str(tmp_path / "m.json"))["machine"]["cores"] == 5


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["plan", "gtp2"], "did you mean 'gpt2'"),
        (["plan", "nowhere/config.json"], "nowhere/config.json"),
        ([*GPT2, "--host-budget", "8 apples"], "'8 apples'"),
        ([*GPT2, "--host-memory", "much"], "'much'"),
        ([*GPT2, "--optimizer", "adam"], "'adam' was asked for"),
        ([*GPT2, "--large-dims", "none"], "large_dims must be one of"),
        ([*GPT2, "--refresh", "never"], "RuntimeConfig.refresh"),
        ([*GPT2, "--machine", "nowhere.json"], "nowhere.json"),
        ([*GPT2, "--cores", "0"], "Machine.cores"),
        ([*GPT2, "--step-time", "-1"], "step_s"),
        (["probe", "--path", "nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_used_ends_with_2_and_one_message(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("asteria: ")
    assert said in err
    assert "Traceback" not in err


@pytest.mark.parametrize("arguments", [[], ["plan"], [*GPT2, "--cores", "many"], ["fly"]])
def test_what_cannot_be_parsed_ends_with_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as raised:
        main(arguments)
    assert raised.value.code == 2
    assert "usage: asteria" in capsys.readouterr().err


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], ["plan", "--help"], ["probe", "--help"]):
        with pytest.raises(SystemExit) as raised:
            main(arguments)
        assert raised.value.code == 0
        assert "exit status" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.strip() == asteria.__version__


class Small(Probe):
    """Takes no time."""

    def measurements(self) -> Any:
        yield "rates", lambda: {"disk_read_bytes_per_s": 1e9, "cores": 6}
        yield "refreshes", lambda: {"refresh_s": ((64, 0.002),)}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_command, "Probe", Small)


@pytest.mark.usefixtures("small")
def test_a_probe_is_written_and_used(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["probe"]) == 0
    out = capsys.readouterr().out
    assert f"written to {default_path()}" in out
    assert "disk reads" in out
    assert "1.00 GB/s" in out
    main(GPT2)
    assert f"rates: measured, {default_path()}" in capsys.readouterr().out


@pytest.mark.usefixtures("small")
def test_a_probe_goes_where_it_is_told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    target = tmp_path / "deep" / "m.json"
    assert main(["probe", "--json", str(target)]) == 0
    assert str(target) in capsys.readouterr().out
    assert load_machine(target).cores == 6
    assert not default_path().exists()


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.usefixtures("small")
def test_a_bar_is_optional_and_never_in_a_file(
    there: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not there:
        monkeypatch.setattr(progress, "tqdm", None)
    steps = [("one", 1), ("two", 2)]
    assert list(progress.in_progress(steps)) == steps
    assert capsys.readouterr().err == "", "stderr is no terminal here"


def test_the_module_that_the_script_calls() -> None:
    """As the installed script does it."""
    call = "import sys; from asteria.cli.main import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", call, "plan", "nonsense"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("asteria: ")
