from __future__ import annotations

import json
from pathlib import Path

import click
import numpy as np
import pytest
from builders import random_refiner
from judged import ROWS, Case, make_case
from script import simskip, simskip_json

from simskip_vdb import cli
from simskip_vdb.durable import sha256_of
from simskip_vdb.errors import JournalError, TransientStoreError

COMMANDS = (
    "demo",
    "inspect",
    "fit",
    "power",
    "evaluate",
    "refine",
    "rollback",
    "status",
    "prune",
    "nightly",
    "report",
)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    case = make_case(tmp_path_factory.mktemp("cli"))
    random_refiner(16, np.arange(0, 10_000, 3)).save(case.folder / "refiner")
    return case


def test_help_names_every_command_and_exit_code() -> None:
    done = simskip("--help")
    assert done.returncode == 0
    assert all(f"  {name}" in done.stdout for name in COMMANDS)
    assert set(cli.cli.commands) == set(COMMANDS)
    assert all(f"  {code}" in done.stdout for code in (0, 1, 2, 3, 4, 5, 6, 130))


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_option_has_help(name: str) -> None:
    done = simskip(name, "--help")
    assert done.returncode == 0
    assert cli.cli.commands[name].help
    for parameter in cli.cli.commands[name].params:
        if isinstance(parameter, click.Option):
            assert parameter.opts[0] in done.stdout
            assert parameter.help


def test_examples_stand_one_a_line() -> None:
    for name in cli.cli.commands:
        shown = simskip(name, "--help").stdout
        assert "\\b" not in shown
        for line in shown.split("Options:")[0].splitlines()[2:]:
            assert line.count("simskip ") <= 1 or "`" in line, line


@pytest.mark.parametrize("index", ["", " ", "faiss:", "parquet:", "qdrant-edge:?vector=x"])
def test_an_empty_address_is_not_the_current_folder(index: str) -> None:
    done = simskip("status", index)
    assert (done.returncode, "is empty" in done.stderr) == (2, True)


def test_the_rules_for_bad_judgments_stand_in_the_help() -> None:
    text = simskip("refine", "--help").stdout
    for word in ("repeated query ids", "NaN", "unknown documents", "60/20/20", "near-identical"):
        assert word in " ".join(text.split())


def test_inspect_describes_the_index(case: Case) -> None:
    found = simskip_json("inspect", case.index)
    assert (found["rows"], found["dim"], found["metric"]) == (ROWS, 16, "dot")
    assert found["norms"]["max"] == pytest.approx(1, abs=1e-5)
    assert found["bad_rows"] == {"not_finite": 0, "zero": 0, "examples": []}
    assert found["duplicate_ids"] == found["duplicate_vectors"] == 0
    assert found["hubness"]["skewness"] > -1
    assert found["readable"] == "exactly"
    assert any("simskip refine" in step for step in found["next"])
    shown = simskip("inspect", case.index).stdout
    assert "IVF4 Flat" in shown
    assert f"{ROWS:,} × 16" in shown


def test_refine_status_rollback(case: Case) -> None:
    before = sha256_of(case.index)
    refused = simskip("refine", case.index, "--refiner", case.folder / "refiner")
    assert refused.returncode == 3
    assert "gate: refused" in refused.stdout
    assert "--accept-unmeasured" in refused.stdout
    assert sha256_of(case.index) == before
    command = ("refine", case.index, "--refiner", case.folder / "refiner", "--accept-unmeasured")
    report = simskip_json(*command)
    assert report["written"]["rows"] == ROWS
    assert report["gate"]["unmeasured"]
    assert "not measured" in simskip("status", case.index).stdout
    undone = simskip_json("rollback", case.index)
    assert undone["exact"]
    assert undone["sha256"] == before == sha256_of(case.index)


def test_fit_then_evaluate(case: Case) -> None:
    out = case.folder / "fitted"
    fitted = simskip_json("fit", case.index, *case.options, "--out", out)
    assert fitted["split"] == "validation"
    assert (out / "refiner.safetensors").is_file()
    measured = simskip_json("evaluate", case.index, *case.options, "--refiner", out)
    assert measured["measures"]["nDCG@10"]["after"] == pytest.approx(
        fitted["measures"]["nDCG@10"]["after"]
    )
    assert "learnt from the validation queries" in " ".join(measured["notes"])
    tested = simskip_json("evaluate", case.index, *case.options, "--refiner", out, "--on", "test")
    assert tested["through_index"]["nDCG@10"]["before"] > 0
    shown = simskip("evaluate", case.index, *case.options, "--refiner", out).stdout
    assert "nDCG@10" in shown
    assert "95 % interval" in shown


def test_dry_run_shows_samples(case: Case) -> None:
    names = sorted(path.name for path in case.folder.iterdir())
    done = simskip("refine", case.index, "--refiner", case.folder / "refiner", "--dry-run")
    assert done.returncode == 0
    assert done.stdout.count("→ [") == 5
    assert sorted(path.name for path in case.folder.iterdir()) == names


def test_json_is_alone_on_stdout_and_bars_stay_off_pipes(case: Case) -> None:
    done = simskip("inspect", case.index, "--json")
    json.loads(done.stdout)
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["inspect", "nothing.faiss"], 1, "no such file"),
        (["inspect", "milvus:x"], 2, "known"),
        (["refine"], 2, "Missing argument"),
        (["refine", "x.faiss", "--side", "up"], 2, "docs"),
        (["refine", "x.faiss", "--queries", "gone.npy"], 2, "does not exist"),
        (["nonsense"], 2, "No such command"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, arguments: list[str], code: int, says: str) -> None:
    done = simskip(*arguments, cwd=tmp_path)
    assert done.returncode == code
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_options_that_do_not_fit_are_refused_before_the_index_is_read(case: Case) -> None:
    done = simskip("refine", case.index, "--queries", case.files.queries)
    assert done.returncode == 2
    assert "--qrels" in done.stderr
    done = simskip("refine", case.index, "--side", "both")
    assert done.returncode == 2
    assert "--output" in done.stderr
    done = simskip("refine", case.index, *case.options, "--search-params", "nprobe")
    assert done.returncode == 2
    assert "nprobe=16" in done.stderr


def test_unknown_search_parameters_are_refused(case: Case) -> None:
    before = sha256_of(case.index)
    done = simskip("evaluate", case.index, *case.options, "--search-params", "efSearch=9")
    assert done.returncode == 2
    assert "nprobe" in done.stderr
    assert sha256_of(case.index) == before


@pytest.mark.parametrize(
    ("option", "says"),
    [
        (("--seed", "-1"), "range"),
        (("--seed", str(2**70)), "range"),
        (("--search-params", "nprobe=99999999999999999999999"), "nprobe"),
        (("--search-params", "nprobe=0"), "nprobe"),
    ],
)
def test_numbers_out_of_range_are_refused(case: Case, option: tuple[str, str], says: str) -> None:
    done = simskip("refine", case.index, *case.options, *option)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_a_device_that_is_not_there_is_named(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    case = make_case(tmp_path / "case")
    done = simskip("fit", case.index, *case.options, "--device", "cuda")
    assert done.returncode == 2
    assert "--device cuda" in done.stderr
    assert "Traceback" not in done.stderr


def test_errors_are_json_too(tmp_path: Path) -> None:
    found = simskip_json("inspect", tmp_path / "nothing.faiss", code=1)
    assert found["error"]["type"] == "StoreNotFoundError"
    assert found["exit_code"] == 1


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (KeyboardInterrupt(), 130),
        (JournalError("damaged"), 1),
        (TransientStoreError("down"), 4),
    ],
)
def test_exit_codes_follow_the_type(
    error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, case: Case
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("simskip_vdb.inspection.inspect", fail)
    monkeypatch.setattr("sys.argv", ["simskip", "inspect", str(case.index)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == code


@pytest.mark.slow
def test_the_demo_gets_better_and_gets_restored(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    found = simskip_json("demo", "--out", tmp_path / "demo")
    assert found["gate"]["passed"]
    measure = found["measures"]["nDCG@10"]
    assert measure["after"] > measure["before"]
    assert measure["ci95"][0] > 0
    assert found["sha256"]["before"] == found["sha256"]["after_rollback"]
    picture = Path(found["picture"]).read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 20_000
