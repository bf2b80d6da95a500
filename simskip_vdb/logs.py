"""How log lines look: text for people, JSON for machines, and no secrets in either."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime, timezone
from typing import Any, Literal

from simskip_vdb.errors import MissingDependencyError
from simskip_vdb.redaction import names_secret, redacted

_about: ContextVar[Mapping[str, Any]] = ContextVar("about", default={})  # noqa: B039 never changed

log = logging.getLogger(__name__)


def configure(level: int | str, format: Literal["text", "json"] = "text") -> None:  # noqa: A002 the option's name
    """Send log lines to stderr; said again, it replaces what it said before.

    Text is level and message, with the job in between where there is one. JSON is one object a
    line with ``time`` (UTC, ISO 8601), ``level``, ``logger``, ``message``, and everything that
    `about` or ``extra`` adds; warnings of Python become such lines too.

    Args:
        level: The lowest level that is shown.
        format: ``text`` or ``json``.

    Raises:
        MissingDependencyError: JSON is asked for and python-json-logger is not installed.
    """
    handler = _Handler(sys.stderr)
    handler.setFormatter(_json_formatter() if format == "json" else _Text())
    handler.addFilter(_add_about)
    root = logging.getLogger()
    for old in root.handlers[:]:
        if isinstance(old, _Handler):
            root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level)
    logging.captureWarnings(format == "json")


@contextmanager
def about(**fields: object) -> Iterator[None]:
    """Add fields to every log line of this thread, such as ``job='products'``."""
    token = _about.set({**_about.get(), **fields})
    try:
        yield
    finally:
        _about.reset(token)


class _Handler(logging.StreamHandler[Any]):
    """Told apart from the handlers of others, which stay."""


def _add_about(record: logging.LogRecord) -> bool:
    for name, value in _about.get().items():
        if not hasattr(record, name):
            setattr(record, name, value)
    return True


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        job = getattr(record, "job", None)
        head = record.levelname if job is None else f"{record.levelname} [{job}]"
        return redacted(f"{head} {super().format(record)}")


def _json_formatter() -> logging.Formatter:
    try:
        from pythonjsonlogger.json import JsonFormatter
    except ImportError as error:
        raise MissingDependencyError("python-json-logger", "nightly") from error

    class Json(JsonFormatter):
        def process_log_record(self, log_record: dict[str, Any]) -> dict[str, Any]:
            # Before they are written as JSON, whose quotes would hide where a secret ends.
            return {name: _without_secrets(name, value) for name, value in log_record.items()}

        def formatTime(
            self,
            record: logging.LogRecord,
            datefmt: str | None = None,
        ) -> str:
            moment = datetime.fromtimestamp(record.created, timezone.utc)
            return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")

    return Json(
        "{asctime}{levelname}{name}{message}",
        style="{",
        rename_fields={"asctime": "time", "levelname": "level", "name": "logger"},
        json_ensure_ascii=False,
    )


def _without_secrets(name: str, value: Any) -> Any:  # noqa: ANN401 any JSON
    if names_secret(name):
        return "…"
    if isinstance(value, Mapping):
        return {key: _without_secrets(str(key), inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_secrets("", inner) for inner in value]
    return redacted(value) if isinstance(value, str) else value


@contextmanager
def only_tells(what: str) -> Iterator[None]:
    """Let a block fail that only tells of what was done: a warning says so, and the run goes on.

    Args:
        what: What the block leaves, for people.
    """
    try:
        yield
    except Exception as error:
        log.warning("%s was not written: %s; what was done to the index stays done", what, error)
