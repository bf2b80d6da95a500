"""One job of the nightly run: an index and how it is looked after."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlsplit

from simskip_vdb.config import Signal
from simskip_vdb.connectors import scheme_of
from simskip_vdb.connectors.qdrant_points import filter_text, parse_filter
from simskip_vdb.crew import LOCAL
from simskip_vdb.datatypes import Side
from simskip_vdb.errors import ConfigError
from simskip_vdb.job_values import Window
from simskip_vdb.journal import IN_PLACE, NEW_COLLECTION, NEW_VECTOR
from simskip_vdb.judgments import JudgmentFiles, misfits

ALERT, ROLL_BACK = "alert", "rollback"
_ARRAYS = ("npy", "npz", "safetensors")
_FILES = ("parquet", *_ARRAYS, "llama-index", "sqlite-vec", "chroma")
_MODES = {
    **dict.fromkeys(("faiss", *_FILES), (IN_PLACE,)),
    **dict.fromkeys(("chroma+http", "lancedb", "postgresql", "postgres"), (IN_PLACE,)),
    "qdrant-edge": (IN_PLACE, NEW_VECTOR),
}
"""What can be written, where not every mode can."""
_PAYLOAD = ("doc_id_field", "group_field", "filter", "guard_field")
_USELESS: Mapping[str, tuple[tuple[str, ...], str]] = defaultdict(
    lambda: ((), ""),
    faiss=(("filter", "guard_field"), "{} is read and written whole"),
    parquet=(("filter", "guard_field", "originals"), "{} is read and written whole"),
    llama=(("filter", "guard_field", "originals"), "{} is read and written whole"),
    **dict.fromkeys(
        ("chroma", "lancedb", "postgresql", "postgres", "qdrant", "sqlite"),
        (("originals",), "{} holds its vectors itself"),
    ),
    **dict.fromkeys(_ARRAYS, ((*_PAYLOAD, "originals"), "rows of {} have no payload")),
)
"""Keys that mean nothing to a scheme, and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refit:
    """When a refit is tried.

    Attributes:
        new_judgments: Share of judged queries that are new, or judged anew, since the last
            attempt, above 0 and up to 1.
        max_age_days: Age of the refiner, above 0; infinite for no limit.
        drift: Whether drift of rows or of queries is a reason.
    """

    new_judgments: float = 0.1
    max_age_days: float = 30.0
    drift: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """What is kept of earlier nights.

    Attributes:
        runs: Records of runs, at least 1.
        refiners: Refiners, beside those that the state needs.
    """

    runs: int = 90
    refiners: int = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One index and how it is looked after; every path is absolute.

    Attributes:
        name: As in ``[jobs.NAME]``.
        line: Where the job begins in its file.
        index: URI of the index.
        files: Files of judgments.
        clicks: Folder where click logs land.
        doc_id_field: Payload field of document ids.
        group_field: Payload field of groups.
        filter: Which rows are meant.
        guard_field: Payload field that the application changes on each write.
        originals: Exact vectors behind lossy codes: a ``.npy`` file or the URI of an index.
        originals_ids: Ids of the vectors in the ``.npy`` file.
        side: What moves.
        mode: Where rows are written.
        executor: ``local`` or ``ray``: who reads and writes the rows.
        signal: What to learn from.
        measure: What the gate judges, by its ir-measures name; None for the default.
        growing: Whether rows keep arriving.
        search_params: Search settings as the application sets them.
        seed: Seed of every random draw.
        device: ``auto``, ``cpu`` or ``cuda``.
        state: The state folder, if not the one beside the index.
        window: When it may run; None for any time.
        rows_per_second: Most rows written in a second; None for no limit.
        on_harm: What to do where fresh queries prove that the live refinement does harm: `ALERT`
            or `ROLL_BACK`.
        refit: When a refit is tried.
        retention: What is kept of earlier nights.
    """

    name: str
    line: int
    index: str
    files: JudgmentFiles = field(default_factory=JudgmentFiles)
    clicks: Path | None = None
    doc_id_field: str | None = None
    group_field: str | None = None
    filter: str | None = None
    guard_field: str | None = None
    originals: str | None = None
    originals_ids: Path | None = None
    side: Side = Side.DOCS
    mode: str = IN_PLACE
    executor: str = LOCAL
    signal: Signal = Signal.AUTO
    measure: str | None = None
    growing: bool = True
    search_params: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0
    device: str = "auto"
    state: Path | None = None
    window: Window | None = None
    rows_per_second: float | None = None
    on_harm: str = ALERT
    refit: Refit = field(default_factory=Refit)
    retention: Retention = field(default_factory=Retention)


def conflicts(job: Job) -> Iterator[str]:
    """Yield a message for each way in which right values do not go together."""
    yield from misfits(
        job.files,
        doc_id_field=job.doc_id_field,
        group_field=job.group_field,
        more=job.clicks is not None,
    )
    files = (getattr(job.files, name.name) for name in fields(JudgmentFiles))
    if not any((*files, job.clicks, job.group_field)):
        yield (
            "there is nothing to prove a gain with; give queries and qrels, judgments (a folder), "
            "labels or group_field"
        )
    if job.on_harm == ROLL_BACK and job.clicks is not None:
        yield (
            "on_harm = 'rollback' needs judgments that do not depend on what was shown, and clicks "
            "in judgments favour what was live when they were made; leave out one of them"
        )
    if job.originals_ids is not None and not (job.originals or "").endswith(".npy"):
        yield "originals_ids belongs to originals = 'FILE.npy'"
    if job.index:
        yield from _misfits_of_index(job, scheme_of(job.index))


def _misfits_of_index(job: Job, scheme: str) -> Iterator[str]:
    names, why = _USELESS[scheme.partition("+")[0].partition("-")[0]]
    for name in names:
        if getattr(job, name) is not None:
            yield f"{name} has no effect: {why.format(job.index)}; leave it out"
    if scheme.startswith("qdrant"):
        try:
            parse_filter(job.filter)
        except ConfigError as error:
            yield str(error)
    if job.executor != LOCAL and job.mode != IN_PLACE:
        yield f"executor {job.executor} writes in place, not by mode {job.mode}"
    modes = _MODES.get(scheme, (IN_PLACE, NEW_VECTOR, NEW_COLLECTION))
    if job.mode not in modes:
        yield f"mode {job.mode} is not for {job.index}; choose {' or '.join(modes)}"
    elif job.side is Side.BOTH and job.mode == IN_PLACE:
        yield "side both cannot be written over the vectors that raw queries use; " + (
            f"choose mode {' or '.join(modes[1:])}" if modes[1:] else "choose docs"
        )


def identity(job: Job) -> object:
    """Return what two jobs of one index have in common."""
    scheme = scheme_of(job.index)
    if scheme == "faiss":
        return scheme, os.path.realpath(job.index.removeprefix("faiss:"))
    place, _, query = job.index.partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    rest = place.partition(":")[2]
    if scheme in (*_FILES, "lancedb", "qdrant-edge", "qdrant-local"):
        rest = os.path.realpath(unquote(rest))
    elif scheme in ("qdrant", "qdrant+https"):
        parts = urlsplit(place)
        rest = f"{parts.netloc.lower().removesuffix(':6333')}{parts.path}"
        scheme = "qdrant"
    rows = job.filter or options.get("filter")
    with suppress(ConfigError):
        rows = filter_text(parse_filter(rows))
    names = ("collection", "vector", "key", "shard_key", "table", "column")
    return scheme, rest, *map(options.get, names), rows
