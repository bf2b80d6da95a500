from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from simskip_vdb.errors import MissingDependencyError, StoreError
from simskip_vdb.metrics import write_metrics

NIGHT = {
    "job": "products",
    "index": "qdrant://localhost:6333/products?vector=text",
    "outcome": "written",
    "exit_code": 0,
    "time": 1_700_000_000.5,
    "rows": {"total": 1000, "new": 20, "changed": 3, "deleted": 1, "written": 23},
    "refiner_age_seconds": 86400.0,
    "measure": {"name": "nDCG@10", "before": 0.5, "after": 0.625},
    "gate_passed": True,
    "drift": {"rows": {"p": 0.25}, "queries": {"p": 0.75}},
    "live": {"refiner": "ab", "queries": 120, "gain": -0.25, "p": 0.04, "harmful": True},
    "seconds": {"read": 1.5, "write": 2},
}
Found = dict[tuple[str, str, str], float]


def night(**changes: Any) -> dict[str, Any]:  # noqa: ANN401
    return {**NIGHT, **changes}


def read(path: Path, job: str = "products") -> Found:
    """Return values by name, the label that it has beside job and index, and index."""
    found: Found = {}
    for family in text_string_to_metric_families(path.read_text()):
        assert family.type == "gauge"
        assert family.documentation
        for sample in family.samples:
            labels = dict(sample.labels)
            if labels.pop("job") != job:
                continue
            index = labels.pop("index")
            (more,) = labels.values() or ("",)
            name = sample.name.removeprefix("simskip_")
            assert name != sample.name
            assert (name, more, index) not in found
            found[name, more, index] = sample.value
    return found


def short(path: Path, job: str = "products") -> dict[str, float]:
    return {" ".join(key[:2]).strip(): value for key, value in read(path, job).items()}


def test_every_value_arrives_with_its_labels(tmp_path: Path) -> None:
    path = tmp_path / "simskip.prom"
    write_metrics(path, [night()])
    index = NIGHT["index"]
    assert read(path) == {
        (name, more, index): value
        for name, more, value in [
            ("last_run_timestamp_seconds", "", 1_700_000_000.5),
            ("last_success_timestamp_seconds", "", 1_700_000_000.5),
            ("exit_code", "", 0),
            ("rows", "", 1000),
            ("rows_new", "", 20),
            ("rows_changed", "", 3),
            ("rows_deleted", "", 1),
            ("rows_written", "", 23),
            ("refiner_age_seconds", "", 86400),
            ("measure_before", "nDCG@10", 0.5),
            ("measure_after", "nDCG@10", 0.625),
            ("gate_passed", "", 1),
            ("live_queries", "", 120),
            ("live_gain", "", -0.25),
            ("live_harmful", "", 1),
            ("drift_p", "rows", 0.25),
            ("drift_p", "queries", 0.75),
            ("seconds", "read", 1.5),
            ("seconds", "write", 2),
        ]
    }
    assert os.listdir(tmp_path) == ["simskip.prom"]


def test_labels_have_their_names(tmp_path: Path) -> None:
    write_metrics(tmp_path / "x.prom", [night()])
    lines = (tmp_path / "x.prom").read_text().splitlines()
    index = 'index="qdrant://localhost:6333/products?vector=text",job="products"'
    assert f'simskip_measure_after{{{index},measure="nDCG@10"}} 0.625' in lines
    assert f'simskip_drift_p{{{index},of="rows"}} 0.25' in lines
    assert f'simskip_seconds{{{index},stage="read"}} 1.5' in lines


def test_what_is_not_known_has_no_metric(tmp_path: Path) -> None:
    failed = {"job": "products", "index": "faiss:x", "exit_code": 1, "time": 5}
    unknown = ("rows", "refiner_age_seconds", "measure", "gate_passed", "drift", "live")
    for job in (failed, {**failed, **dict.fromkeys(unknown), "seconds": {}}):
        write_metrics(tmp_path / "x.prom", [job])
        assert short(tmp_path / "x.prom") == {"last_run_timestamp_seconds": 5, "exit_code": 1}
    write_metrics(tmp_path / "x.prom", [night(drift={"rows": {"p": 0.5}, "queries": None})])
    assert "drift_p queries" not in short(tmp_path / "x.prom")
    write_metrics(tmp_path / "x.prom", [night(gate_passed=False)])
    assert short(tmp_path / "x.prom")["gate_passed"] == 0


@pytest.mark.parametrize("moment", ["2023-11-14T22:13:20.5Z", "2023-11-14T23:13:20.500000+01:00"])
def test_times_may_be_iso_8601(tmp_path: Path, moment: str) -> None:
    if sys.version_info < (3, 11):
        moment = moment.replace("20.5Z", "20.500Z")
    write_metrics(tmp_path / "x.prom", [night(time=moment)])
    assert short(tmp_path / "x.prom")["last_run_timestamp_seconds"] == 1_700_000_000.5


@pytest.mark.parametrize(("code", "success"), [(0, 20), (3, 20), (1, 10), (2, 10), (4, 10)])
def test_the_last_success_is_kept_while_nights_fail(
    tmp_path: Path, code: int, success: int
) -> None:
    path = tmp_path / "x.prom"
    write_metrics(path, [night(time=10)])
    for _ in range(2):
        write_metrics(path, [night(time=20, exit_code=code, index="moved")])
    found = read(path)
    assert found["last_success_timestamp_seconds", "", "moved"] == success
    assert found["last_run_timestamp_seconds", "", "moved"] == 20
    assert {index for _, _, index in found} == {"moved"}


def test_jobs_stay_apart_and_idle_ones_stay(tmp_path: Path) -> None:
    path = tmp_path / "x.prom"
    write_metrics(path, [night(job=name, time=i, index=name) for i, name in enumerate("abc")])
    before = read(path, "b")
    write_metrics(path, [night(job="a", time=9, exit_code=1)], idle=["b"])
    assert short(path, "a")["last_success_timestamp_seconds"] == 0
    assert read(path, "b") == before
    assert not read(path, "c")


@pytest.mark.parametrize("text", [b"not { metrics", b"\xff\xfe", b'simskip_rows{job="a"} x\n'])
def test_a_damaged_old_file_is_replaced(
    tmp_path: Path, text: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "x.prom"
    path.write_bytes(text)
    with caplog.at_level(logging.WARNING):
        write_metrics(path, [night(exit_code=1)])
    assert "forgets when jobs last succeeded" in caplog.text
    assert short(path)["exit_code"] == 1


def test_metrics_of_others_are_not_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "x.prom"
    path.write_text('up{job="products",index="x"} 1\nsimskip_rows{job="products"} 7\n')
    write_metrics(path, [], idle=["products"])
    assert "up" not in path.read_text()
    assert read(path) == {}


def test_names_with_quotes_and_secrets_are_safe(tmp_path: Path) -> None:
    path = tmp_path / "x.prom"
    write_metrics(path, [night(index='faiss:/a "b"\\c\nd')])
    write_metrics(path, [], idle=["products"])
    assert {index for _, _, index in read(path)} == {'faiss:/a "b"\\c\nd'}
    write_metrics(path, [night(index="qdrant://me:hunter2@host/c")])
    assert "hunter2" not in path.read_text()


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="metrics cannot be written: No such file"):
        write_metrics(tmp_path / "nowhere" / "x.prom", [night()])
    with pytest.raises(StoreError, match="metrics cannot be written"):
        write_metrics(tmp_path, [night()])
    assert not list(tmp_path.parent.glob(f"{tmp_path.name}.*"))


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.prom"
    write_metrics(path, [night()])
    before = path.read_bytes()

    def refuse(*paths: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", refuse)
    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(StoreError, match="No space left on device"):
        write_metrics(path, [night(time=7)])
    assert path.read_bytes() == before


def test_a_missing_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(MissingDependencyError, match=r"simskip-vdb\[nightly\]"):
        write_metrics(tmp_path / "x.prom", [night()])
