from __future__ import annotations

import json
import logging
import subprocess
import sys
import warnings
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest

from simskip_vdb import logs
from simskip_vdb.errors import MissingDependencyError

log = logging.getLogger("simskip_vdb.some.module")


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    # A command that ran in this process may have left its own.
    root.handlers[:] = [held for held in handlers if not isinstance(held, logs._Handler)]
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    out, err = capsys.readouterr()
    assert out == ""
    return err.splitlines()


def records(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in lines(capsys)]


def test_text_is_level_and_message(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("INFO", "text")
    log.info("read %d rows", 5)
    log.debug("not this")
    with logs.about(job="products"):
        log.warning("late")
    log.info("of this job", extra={"job": "papers"})
    assert lines(capsys) == [
        "INFO read 5 rows",
        "WARNING [products] late",
        "INFO [papers] of this job",
    ]


def test_json_is_one_object_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(logging.INFO, "json")
    before = datetime.now(timezone.utc)
    log.info("größer\nals %s", "'\"", extra={"job": "products", "rows": 5})
    (record,) = records(capsys)
    moment = record.pop("time")
    assert moment.endswith("Z")
    written = datetime.fromisoformat(moment.replace("Z", "+00:00"))
    assert abs(written - before) < timedelta(seconds=5)
    assert record == {
        "level": "INFO",
        "logger": "simskip_vdb.some.module",
        "message": "größer\nals '\"",
        "job": "products",
        "rows": 5,
    }


def test_fields_hold_inside_a_block_and_add_up(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(logging.INFO, "json")
    with logs.about(job="products"):
        with logs.about(stage="read"):
            log.info("one")
            log.info("two", extra={"stage": "write"})
        log.info("three")
    log.info("four")
    found = [(record.get("job"), record.get("stage")) for record in records(capsys)]
    assert found == [
        ("products", "read"), ("products", "write"), ("products", None), (None, None),
    ]  # fmt: skip


def test_a_traceback_stays_in_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(logging.INFO, "json")
    try:
        raise ValueError("password=hunter2")
    except ValueError:
        log.exception("failed")
    (record,) = records(capsys)
    assert "ValueError: password=…" in record["exc_info"]
    assert record["level"] == "ERROR"


def test_warnings_of_python_are_json_too(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(logging.INFO, "json")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("old", DeprecationWarning, stacklevel=1)
    (record,) = records(capsys)
    assert record["logger"] == "py.warnings"


@pytest.mark.parametrize("format", ["text", "json"])
def test_secrets_are_never_shown(capsys: pytest.CaptureFixture[str], format: Any) -> None:  # noqa: A002, ANN401
    logs.configure(logging.INFO, format)
    log.info("opening %s", "qdrant+https://me:hunter2@host:6333/products?vector=text")
    log.info("GET http://host/c?api_key=hunter2")
    log.info("x", extra={"api_key": "hunter2", "request": {"token": "hunter2", "at": 1}})
    log.info("x", extra={"uris": ["qdrant://hunter2@host/c"], "message_of": 'password="hunter2"'})
    with logs.about(job="qdrant://me:hunter2@host/c"):
        log.info("x")
    err = capsys.readouterr().err
    assert "hunter2" not in err
    assert "://…@host:6333/products?vector=text" in err


def test_said_again_it_replaces_what_it_said(capsys: pytest.CaptureFixture[str]) -> None:
    others = logging.getLogger().handlers[:]
    logs.configure(logging.INFO, "json")
    logs.configure(logging.WARNING, "text")
    log.info("x")
    log.warning("y")
    assert lines(capsys) == ["WARNING y"]
    assert logging.getLogger().handlers[:-1] == others


def test_json_without_its_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pythonjsonlogger.json", None)
    logs.configure(logging.INFO, "text")
    with pytest.raises(MissingDependencyError, match=r"simskip-vdb\[nightly\]"):
        logs.configure(logging.INFO, "json")


def test_importing_it_adds_no_handler() -> None:
    code = "import logging, simskip_vdb.logs as x; print(logging.getLogger().handlers)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
