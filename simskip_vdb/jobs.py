"""The job file of the nightly run: which indexes are looked after, and how."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

from simskip_vdb import job_values as values
from simskip_vdb.config import Signal
from simskip_vdb.crew import LOCAL, RAY
from simskip_vdb.datatypes import Side
from simskip_vdb.errors import ConfigError
from simskip_vdb.job import ALERT, ROLL_BACK, Job, Refit, Retention, conflicts, identity
from simskip_vdb.job_values import SECRETS, Kind, Window, WrongValue
from simskip_vdb.journal import IN_PLACE, NEW_COLLECTION, NEW_VECTOR
from simskip_vdb.judgments import JudgmentFiles
from simskip_vdb.redaction import names_secret, redacted
from simskip_vdb.toml_lines import Keys, Lines, read_toml

__all__ = ["Job", "Jobs", "Refit", "Retention", "Window", "read_jobs"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Jobs:
    """A job file.

    Attributes:
        path: The file.
        jobs: Those that are wanted, in the order of the file, at least one.
        left_out: Names of the others.
        metrics: Where metrics are written for Prometheus.
        cost_per_hour: What an hour of the machine costs, for forecasts.
    """

    path: Path
    jobs: tuple[Job, ...]
    left_out: tuple[str, ...] = ()
    metrics: Path | None = None
    cost_per_hour: float | None = None


_TABLES: Mapping[str, Mapping[str, Kind]] = {
    "refit": {
        "new_judgments": values.number("a share above 0, up to 1", lambda x: 0 < x <= 1),
        "max_age_days": values.number("days above 0, or inf for no limit", lambda x: x > 0),
        "drift": values.flag,
    },
    "retention": {"runs": values.whole(1), "refiners": values.whole(0)},
    "search_params": {},
}
"""Sub-tables by key; the last takes any key."""
_FILES: Mapping[str, Kind] = {
    f.name: values.judgments if f.name.endswith("qrels") else values.file
    for f in fields(JudgmentFiles)
}
_KEYS: Mapping[str, Kind] = {
    "index": values.address,
    **_FILES,
    "judgments": values.folder,
    "doc_id_field": values.text,
    "group_field": values.text,
    "filter": values.condition,
    "guard_field": values.text,
    "originals": values.originals,
    "originals_ids": values.file,
    "side": values.choice(Side.DOCS.value, Side.BOTH.value),  # others leave nothing to write
    "mode": values.choice(IN_PLACE, NEW_VECTOR, NEW_COLLECTION),
    "executor": values.choice(LOCAL, RAY),
    "signal": values.choice(*(signal.value for signal in Signal)),
    "measure": values.measure,
    "growing": values.flag,
    "seed": values.whole(0, 2**32 - 1),
    "device": values.choice("auto", "cpu", "cuda"),
    "state": values.new_folder,
    "window": values.window,
    "rows_per_second": values.number("a number above 0", lambda x: 0 < x < math.inf),
    "on_harm": values.choice(ALERT, ROLL_BACK),
}
_TOP: Mapping[str, Kind] = {
    "metrics": values.new_file,
    "cost_per_hour": values.number("a number from 0 up", lambda x: 0 <= x < math.inf),
}
_TOP_TABLES = ("defaults", "jobs")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class _Value(NamedTuple):
    value: Any
    line: int


_Values = dict[str, _Value]
"""By key; those of sub-tables as ``TABLE.KEY``."""


def read_jobs(path: Path | str, only: Sequence[str] = ()) -> Jobs:
    """Read a job file and check all of it; no index is opened.

    Relative paths, those in URIs included, start from the file's folder.

    Args:
        path: The file, TOML.
        only: Names of the jobs that are wanted; all without any. The others are checked too.

    Raises:
        ConfigError: Something is wrong; the message names every problem, each on a line of its
            own that begins with ``PATH:LINE:``.
        MissingDependencyError: ir_measures is not installed, or tomli where Python is 3.10.
    """
    path = Path(path)
    content, lines = read_toml(path)
    reading = _Reading(path, lines)
    top = reading.take({k: v for k, v in content.items() if k not in _TOP_TABLES}, (), _TOP)
    shared = reading.table(content.get("defaults", {}), ("defaults",))
    jobs = [job for job in reading.jobs(content.get("jobs", {}), shared) if job is not None]
    reading.check_apart(jobs)
    _check_known(only, content.get("jobs"), reading)
    reading.finish()
    return Jobs(
        path=path,
        jobs=tuple(job for job in jobs if not only or job.name in only),
        left_out=tuple(job.name for job in jobs if only and job.name not in only),
        **{key: found.value for key, found in top.items()},
    )


def _check_known(only: Sequence[str], jobs: object, reading: _Reading) -> None:
    names = list(jobs) if isinstance(jobs, dict) else []
    for name in only if names else ():
        if name not in names:
            reading.problems.append((0, f"there is no job '{name}'{_meant(name, names)}"))


class _Reading:
    """A file being checked, and what was found wrong with it."""

    def __init__(self, path: Path, lines: Lines) -> None:
        self._path = path
        # A link is not followed: a mounted one leads to a folder of another name each time.
        self._base = path.absolute().parent
        self._lines = lines
        self._failed: list[Keys] = []
        self.problems: list[tuple[int, str]] = []

    def finish(self) -> None:
        """Raise what was found, if anything."""
        found = sorted(set(self.problems))
        if not found:
            return
        texts = [f"{self._path}{f':{line}' if line else ''}: {text}" for line, text in found]
        if len(texts) > 1:
            texts.insert(0, f"{self._path} has {len(texts)} problems; nothing was touched")
        raise ConfigError(redacted("\n".join(texts)))

    def jobs(self, tables: object, shared: _Values) -> Iterator[Job | None]:
        """Yield each job, None where it cannot be made."""
        if not isinstance(tables, dict) or not tables:
            given = f"jobs is {values.type_of(tables)}" if tables else "there are no jobs"
            line = self._lines.get(("jobs",), 0)
            self.problems.append((line, f"{given}; write a table [jobs.NAME] for each index"))
            return
        for name, table in tables.items():
            at = ("jobs", name)
            if not _NAME.fullmatch(name):
                self._wrong(at, "a name has up to 64 letters, digits, dots, dashes, underscores")
            found = self.table(table, at)
            if isinstance(table, dict):
                yield self._job(name, {**shared, **found})

    def table(self, table: object, at: Keys) -> _Values:
        """Return what is right in the settings of a job, or of all jobs."""
        if not isinstance(table, dict):
            self._wrong(at, f"it is {values.type_of(table)}; make it a table [{'.'.join(at)}]")
            return {}
        plain = {key: value for key, value in table.items() if key not in _TABLES}
        found = self.take(plain, at, _KEYS)
        for key, kinds in _TABLES.items():
            inner = table.get(key, {})
            if isinstance(inner, dict):
                known = kinds or dict.fromkeys(inner, values.finite)
                part = self.take(inner, (*at, key), known)
                found |= {f"{key}.{name}": value for name, value in part.items()}
            else:
                what = f"{key} is {values.type_of(inner)}"
                self._wrong((*at, key), f"{what}; write a table, such as {key} = {{ name = 1 }}")
        return found

    def take(self, given: Mapping[str, object], at: Keys, kinds: Mapping[str, Kind]) -> _Values:
        """Return the values that are right, converted."""
        found: _Values = {}
        for key, value in given.items():
            way = (*at, key)
            if names_secret(key):
                advice = f"{SECRETS}; remove it here, and change it if others could read it"
                self._wrong(way, f"'{_dotted(way)}' looks like a secret; {advice}")
            elif key not in kinds:
                self._wrong(way, f"unknown key '{_dotted(way)}'{_hint(key, at, kinds)}")
            else:
                try:
                    converted = kinds[key](value, self._base)
                    found[key] = _Value(converted, self._line(way))
                except WrongValue as error:
                    self._failed.append(way)
                    self._wrong(way, f"{_dotted(way)} {error}")
        return found

    def check_apart(self, jobs: Sequence[Job]) -> None:
        """Find jobs that would meet in one index, or in one state folder."""
        indexes: dict[object, Job] = {}
        states: dict[Path, Job] = {}
        for job in jobs:
            other = indexes.setdefault(identity(job), job)
            if other is not job:
                text = f"{job.index} is the index of job '{other.name}' (line {other.line}) too"
                self.problems.append((job.line, f"{_who(('jobs', job.name))}: {text}; keep one"))
            if job.state is None:
                continue
            other = states.setdefault(job.state.resolve(), job)
            if other is not job:
                text = f"job '{other.name}' (line {other.line}) keeps its state in {job.state} too"
                self.problems.append(
                    (job.line, f"{_who(('jobs', job.name))}: {text}; give each its own")
                )

    def _job(self, name: str, found: _Values) -> Job | None:
        at = ("jobs", name)
        got = {key: value for key, (value, _) in found.items()}
        files = JudgmentFiles(**{key: got.pop(key) for key in _FILES if key in got})
        clicks = got.pop("judgments", None)
        parts = {key: _part(got, key) for key in _TABLES}
        wrong = {way[2] for way in self._failed if way[:2] == at}
        wrong |= {way[1] for way in self._failed if way[0] == "defaults"} - set(found)
        if "index" not in {*got, *wrong}:
            self._wrong(at, "it has no index; name one, such as index = 'faiss:products.faiss'")
        job = Job(
            name=name,
            line=self._line(at),
            index=got.pop("index", ""),
            files=files,
            clicks=clicks,
            side=Side(got.pop("side", Side.DOCS)),
            signal=Signal(got.pop("signal", Signal.AUTO)),
            search_params=parts["search_params"],
            refit=Refit(**parts["refit"]),
            retention=Retention(**parts["retention"]),
            **got,
        )
        for text in conflicts(job):
            # The options of the command line are keys here; the first that was given has the line.
            said = re.sub(r"--([a-z][a-z-]*)", lambda match: match[1].replace("-", "_"), text)
            words = re.findall(r"\w+", said)
            line = next((found[word].line for word in words if word in found), job.line)
            if not wrong & set(words):  # what is wrong by itself was said already
                self.problems.append((line, f"{_who(at)}: {said}"))
        return job if job.index else None

    def _line(self, way: Keys) -> int:
        return self._lines.get(way, 0)

    def _wrong(self, way: Keys, what: str) -> None:
        who = _who(way)
        self.problems.append((self._line(way), f"{who}: {what}" if who else what))


def _who(way: Keys) -> str:
    return f"job '{way[1]}'" if way[0] == "jobs" else "defaults" if way[0] == "defaults" else ""


def _dotted(way: Keys) -> str:
    """Return a key as it is called inside its job."""
    return ".".join(way[2:] if way[0] == "jobs" else way[1:] if way[0] == "defaults" else way)


def _hint(key: str, at: Keys, kinds: Mapping[str, Kind]) -> str:
    if not at and key.replace("-", "_") in (*_KEYS, *_TABLES):
        return "; it belongs under [defaults] or [jobs.NAME]"
    if len(at) > (2 if at[:1] == ("jobs",) else 1):
        return _meant(key, list(kinds))
    return _meant(key, [*kinds, *(_TABLES if at else _TOP_TABLES)])


def _meant(name: str, known: Sequence[str]) -> str:
    close = get_close_matches(name.replace("-", "_"), known, 1) or get_close_matches(name, known, 1)
    return f"; did you mean '{close[0]}'?" if close else f"; known: {', '.join(known)}"


def _part(got: dict[str, Any], table: str) -> dict[str, Any]:
    names = [key for key in got if key.startswith(f"{table}.")]
    return {key.partition(".")[2]: got.pop(key) for key in names}
