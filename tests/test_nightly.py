"""Many indexes in one night: one that fails stops no other, and the worst exit code counts."""

from __future__ import annotations

import json
import signal
import subprocess
from datetime import datetime, timedelta
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
from judged import Case, make_case
from prometheus_client.parser import text_string_to_metric_families
from script import SIMSKIP, simskip

import simskip_vdb as ss
from simskip_vdb import night
from simskip_vdb.jobs import read_jobs
from simskip_vdb.journal import Journal
from simskip_vdb.nightly import render_nightly, run_nightly

JUDGED = """
queries = "{0}/q.npy"
query_ids = "{0}/q.txt"
qrels = "{0}/qrels.tsv"
doc_ids = "{0}/ids.tsv"
"""


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, Case]:
    folder = tmp_path_factory.mktemp("jobs")
    return make_case(folder / "good"), make_case(folder / "lot", gain=False)


def job(name: str, case: Case, more: str = "") -> str:
    return f'[jobs.{name}]\nindex = "{case.index}"\n' + JUDGED.format(case.folder) + more + "\n"


def write(folder: Path, *parts: str) -> Path:
    path = folder / "jobs.toml"
    path.write_text("\n".join(parts))
    return path


def outcomes(result: dict[str, Any]) -> dict[str, tuple[str, int]]:
    return {found["job"]: (found["outcome"], found["exit_code"]) for found in result["jobs"]}


def test_one_that_fails_stops_no_other_and_the_worst_code_counts(
    cases: tuple[Case, Case], tmp_path: Path
) -> None:
    good, lot = cases
    broken = tmp_path / "broken.faiss"
    broken.write_bytes(b"no index")
    metrics = tmp_path / "simskip.prom"
    path = write(
        tmp_path,
        f'metrics = "{metrics}"',
        f'[jobs.broken]\nindex = "{broken}"\n{JUDGED.format(good.folder)}',
        job("good", good),
        job("lot", lot),
    )
    result = run_nightly(read_jobs(path))
    assert outcomes(result) == {
        "broken": ("failed", 1),
        "good": ("written", 0),
        "lot": ("refused", 3),
    }
    assert result["exit_code"] == 1
    text = render_nightly(result)
    assert text.splitlines()[0].split()[:2] == ["job", "outcome"]
    assert "broken: " in text
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    families = {f.name: f for f in text_string_to_metric_families(metrics.read_text())}
    codes = {s.labels["job"]: s.value for s in families["simskip_exit_code"].samples}
    assert codes == {"broken": 1, "good": 0, "lot": 3}
    assert ss.status(ss.open_store(str(good.index)))["refined"] is not None

    again = run_nightly(read_jobs(path, ["good", "lot"]))
    assert outcomes(again) == {"good": ("quiet", 0), "lot": ("quiet", 0)}
    assert again["exit_code"] == 0
    families = {f.name: f for f in text_string_to_metric_families(metrics.read_text())}
    codes = {s.labels["job"]: s.value for s in families["simskip_exit_code"].samples}
    assert codes == {"broken": 1, "good": 0, "lot": 0}  # who was left out is as it was


def test_a_dry_run_says_what_it_would_take(cases: tuple[Case, Case], tmp_path: Path) -> None:
    good, _ = cases
    path = write(tmp_path, "cost_per_hour = 2.0", job("good", good, "refit.new_judgments = 0.01"))
    run_nightly(read_jobs(path))
    before = {p: p.read_bytes() for p in good.folder.rglob("*") if p.is_file()}
    result = run_nightly(read_jobs(path), dry_run=True)
    (found,) = result["jobs"]
    assert found["outcome"] == "quiet"
    assert found["messages"] == [
        f"about {found['seconds']['read']:.0f} s, 0.00 at 2 an hour, going by the last runs"
    ]
    assert {p: p.read_bytes() for p in good.folder.rglob("*") if p.is_file()} == before


def closed(now: datetime) -> str:
    later = now + timedelta(hours=3)
    return f'window = "{later:%H:%M}-{later + timedelta(hours=1):%H:%M}"'


def test_a_job_waits_for_its_window(cases: tuple[Case, Case], tmp_path: Path) -> None:
    path = write(tmp_path, job("good", cases[0], closed(datetime.now())))
    assert outcomes(run_nightly(read_jobs(path))) == {"good": ("outside its window", 0)}


def test_an_index_in_use_is_stepped_aside_from(cases: tuple[Case, Case], tmp_path: Path) -> None:
    good, lot = cases
    path = write(tmp_path, job("lot", lot, "refit.max_age_days = 0.000001"), job("good", good))
    info = ss.open_store(str(lot.index)).info()
    assert info.state is not None
    with Journal(info.state, info):
        result = run_nightly(read_jobs(path))
    found = outcomes(result)
    assert found["lot"] == ("stepped aside", 0)
    assert found["good"][1] == 0


def test_a_stop_ends_the_night_between_two_batches(
    cases: tuple[Case, Case], tmp_path: Path
) -> None:
    good, lot = cases
    stop = Event()
    path = write(tmp_path, job("lot", lot, "refit.max_age_days = 0.000001"), job("good", good))
    before = lot.index.read_bytes()

    def ask(stage: str, done: int, total: int) -> None:
        stop.set()

    result = run_nightly(read_jobs(path), stop=stop, progress=ask)
    assert outcomes(result) == {"lot": ("stopped", 4), "good": ("stopped", 4)}
    assert result["exit_code"] == 4
    assert lot.index.read_bytes() == before


def test_click_logs_are_evidence(tmp_path: Path) -> None:
    case = make_case(tmp_path / "clicked")
    vectors = np.load(case.folder / "q.npy").astype(float)
    logs = tmp_path / "logs"
    logs.mkdir()
    lines = (case.folder / "qrels.tsv").read_text().splitlines()[1:]
    clicks = [line.split("\t") for line in lines]
    with (logs / "monday.jsonl").open("w") as file:
        for query, doc, _ in clicks:
            vector = vectors[int(query[1:])].tolist()
            file.write(json.dumps({"id": query, "vector": vector, "doc": doc}) + "\n")
    path = write(
        tmp_path,
        f'[jobs.a]\nindex = "{case.index}"\njudgments = "{logs}"',
        f'doc_ids = "{case.folder}/ids.tsv"',
    )
    result = run_nightly(read_jobs(path))
    assert outcomes(result) == {"a": ("written", 0)}
    (logs / "tuesday.jsonl").write_text('{"id": "new", "vector": [1')
    result = run_nightly(read_jobs(path))
    assert outcomes(result) == {"a": ("failed", 1)}
    assert "tuesday.jsonl" in result["jobs"][0]["messages"][0]


def test_the_command(cases: tuple[Case, Case], tmp_path: Path) -> None:
    path = write(tmp_path, job("good", cases[0]))
    done = simskip("nightly", path, "--check")
    assert (done.returncode, done.stdout.strip()) == (0, f"{path}: 1 jobs, no problems")
    done = simskip("nightly", path, "--json", "--log-format", "json")
    assert done.returncode == 0, done.stderr
    assert [found["job"] for found in json.loads(done.stdout)["jobs"]] == ["good"]
    assert all(json.loads(line)["level"] for line in done.stderr.splitlines())
    path.write_text('[jobs.good]\nindx = "x"\n')
    done = simskip("nightly", path, "--json")
    assert done.returncode == 2
    assert "jobs.toml:2" in json.loads(done.stdout)["error"]["message"]


def test_sigterm_stops_between_batches_with_code_4(tmp_path: Path) -> None:
    case = make_case(tmp_path / "case")
    path = write(tmp_path, job("good", case))
    before = case.index.read_bytes()
    child = subprocess.Popen(
        [SIMSKIP, "-v", "nightly", str(path)],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stderr is not None
    for line in child.stderr:
        if "fitting again" in line:
            break
    child.send_signal(signal.SIGTERM)
    out, _ = child.communicate(timeout=120)
    assert child.returncode == 4
    assert "stopped" in out
    assert case.index.read_bytes() == before


@pytest.mark.parametrize(("on_harm", "outcome"), [("alert", "quiet"), ("rollback", "restored")])
def test_harm_has_an_exit_code_and_a_metric(
    cases: tuple[Case, Case],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    on_harm: str,
    outcome: str,
) -> None:
    case = make_case(tmp_path / "case")
    metrics = tmp_path / "simskip.prom"
    path = write(tmp_path, f'metrics = "{metrics}"', job("one", case, f'on_harm = "{on_harm}"'))
    assert run_nightly(read_jobs(path))["exit_code"] == 0
    rows = np.load(case.folder / "q.npy")
    more = np.concatenate([rows, rows[:200] + 0.01]).astype(np.float16)
    np.save(case.folder / "q.npy", more)
    with (case.folder / "q.txt").open("a") as names, (case.folder / "qrels.tsv").open("a") as qrels:
        for i in range(200):
            names.write(f"new{i}\n")
            qrels.write(f"new{i}\tdoc-{i}\t1\n")
    monkeypatch.setattr(night, "live_gains", lambda space, asked: np.full(len(asked), -0.5))
    path.write_text(path.read_text() + "refit = { new_judgments = 1.0, drift = false }\n")
    result = run_nightly(read_jobs(path))
    assert outcomes(result) == {"one": (outcome, 6)}
    assert result["exit_code"] == 6
    text = render_nightly(result)
    assert "does harm" in text
    assert ("on_harm" in text) is (on_harm == "alert")
    assert "simskip_live_harmful" in metrics.read_text()
    refined = ss.status(ss.open_store(str(case.index)))["refined"]
    assert (refined is None) is (on_harm == "rollback")
