"""What a night did, as a text file that Prometheus's node exporter reads."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from simskip_vdb.errors import MissingDependencyError, StoreError
from simskip_vdb.redaction import redacted

log = logging.getLogger(__name__)

SUCCESS = (0, 3)
"""Exit codes of a night that went as it should; a gate that refuses has done its work."""
_LAST_SUCCESS = "simskip_last_success_timestamp_seconds"
_FAMILIES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "simskip_last_run_timestamp_seconds": ("When the job last ran.", ()),
    _LAST_SUCCESS: ("When it last ended with exit code 0 or 3.", ()),
    "simskip_exit_code": (
        "How it ended: 0 done, 1 failed, 3 refused, 4 stopped, 5 no row, 6 harm.",
        (),
    ),
    "simskip_rows": ("Rows of the index.", ()),
    "simskip_rows_new": ("Rows that were not there the night before.", ()),
    "simskip_rows_changed": ("Rows that the application changed.", ()),
    "simskip_rows_deleted": ("Rows that are gone.", ()),
    "simskip_rows_written": ("Rows that were written.", ()),
    "simskip_refiner_age_seconds": ("Age of the refiner in use.", ()),
    "simskip_measure_before": ("What the gate judged, without the refiner.", ("measure",)),
    "simskip_measure_after": ("What the gate judged, with the refiner.", ("measure",)),
    "simskip_gate_passed": ("Whether the gate let it pass, 1 or 0.", ()),
    "simskip_live_queries": ("Fresh queries that the live refinement was watched by.", ()),
    "simskip_live_gain": ("What each gained by it over the originals, on average.", ()),
    "simskip_live_harmful": ("Whether they prove that it does harm, 1 or 0.", ()),
    "simskip_drift_p": ("Probability of such a drift where there is none.", ("of",)),
    "simskip_seconds": ("Time that a stage took.", ("stage",)),
}
"""Help text, and labels beside job and index."""


class _Sample(NamedTuple):
    name: str
    labels: Mapping[str, str]
    value: float


def write_metrics(
    path: Path, jobs: Sequence[Mapping[str, Any]], *, idle: Collection[str] = ()
) -> None:
    """Replace the file atomically by the metrics of these jobs.

    The time of the last success is taken over from the old file for a job that did not succeed.

    Args:
        path: The file; the node exporter reads names that end with ``.prom``.
        jobs: What each job did. Keys: job, index, exit_code, time (seconds since 1970, or ISO
            8601), rows {total, new, changed, deleted, written}, refiner_age_seconds, measure
            {name, before, after}, gate_passed, live {queries, gain, harmful}, drift {rows {p},
            queries {p}}, seconds {stage: seconds}; what is None or missing has no metric.
        idle: Jobs that did not run this time and are still looked after: what the old file says
            of them stays.

    Raises:
        StoreError: The file cannot be written.
        MissingDependencyError: prometheus-client is not installed.
    """
    try:
        from prometheus_client import CollectorRegistry, Gauge, write_to_textfile
    except ImportError as error:
        raise MissingDependencyError("prometheus-client", "nightly") from error
    old = _read(path)
    samples = [sample for sample in old if sample.labels["job"] in idle]
    for job in jobs:
        new = list(_samples(job))
        succeeded = [sample for sample in old if sample.labels["job"] == job["job"]]
        if job["exit_code"] not in SUCCESS:
            new += [
                sample._replace(labels={**sample.labels, **new[0].labels})
                for sample in succeeded
                if sample.name == _LAST_SUCCESS
            ][:1]
        samples += new
    registry = CollectorRegistry()
    gauges = {
        name: Gauge(name, text, ("job", "index", *labels), registry=registry)
        for name, (text, labels) in _FAMILIES.items()
    }
    for sample in samples:
        gauges[sample.name].labels(**sample.labels).set(sample.value)
    try:
        write_to_textfile(str(path), registry)
    except OSError as error:
        raise StoreError(
            f"{path}: metrics cannot be written: {error.strerror or error}; allow writing in its "
            "folder, or free space"
        ) from error


def _samples(job: Mapping[str, Any]) -> Iterator[_Sample]:
    """Yield the time of the run first."""
    labels = {"job": str(job["job"]), "index": redacted(str(job["index"]))}
    when = _seconds(job["time"])
    rows, measure, drift, live = (
        job.get(name) or {} for name in ("rows", "measure", "drift", "live")
    )
    found: list[tuple[str, Mapping[str, str], Any]] = [
        ("last_run_timestamp_seconds", {}, when),
        ("last_success_timestamp_seconds", {}, when if job["exit_code"] in SUCCESS else None),
        ("exit_code", {}, job["exit_code"]),
        ("rows", {}, rows.get("total")),
        *(
            (f"rows_{name}", {}, rows.get(name))
            for name in ("new", "changed", "deleted", "written")
        ),
        ("refiner_age_seconds", {}, job.get("refiner_age_seconds")),
        *(
            (f"measure_{name}", {"measure": str(measure.get("name"))}, measure.get(name))
            for name in ("before", "after")
        ),
        ("gate_passed", {}, job.get("gate_passed")),
        *((f"live_{name}", {}, live.get(name)) for name in ("queries", "gain", "harmful")),
        *(("drift_p", {"of": of}, (drift.get(of) or {}).get("p")) for of in ("rows", "queries")),
        *(("seconds", {"stage": stage}, s) for stage, s in (job.get("seconds") or {}).items()),
    ]
    for name, more, value in found:
        if value is not None:
            yield _Sample(f"simskip_{name}", {**labels, **more}, float(value))


def _seconds(moment: float | str) -> float:
    if isinstance(moment, str):
        # Python 3.10 reads no Z.
        return datetime.fromisoformat(moment.replace("Z", "+00:00")).timestamp()
    return moment


def _read(path: Path) -> list[_Sample]:
    """Return what the old file says; nothing where it cannot be read."""
    from prometheus_client.parser import text_string_to_metric_families

    try:
        families = list(text_string_to_metric_families(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return []
    except (OSError, ValueError, IndexError, KeyError) as error:
        log.warning("%s is not read, so it forgets when jobs last succeeded: %s", path, error)
        return []
    return [
        _Sample(sample.name, sample.labels, sample.value)
        for family in families
        for sample in family.samples
        if set(sample.labels) == {"job", "index", *_FAMILIES.get(sample.name, ("", ()))[1]}
        and sample.name in _FAMILIES
    ]
