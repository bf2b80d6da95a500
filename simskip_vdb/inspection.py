"""What an index is, how healthy its vectors are, and what could be done next."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from simskip_vdb.datatypes import Progress, StoreInfo, VectorBatch, Vectors, id_names, silent
from simskip_vdb.errors import JournalError, StoreError
from simskip_vdb.report import number
from simskip_vdb.rows import SOUND, row_digests, usable_vectors
from simskip_vdb.search import exact_search
from simskip_vdb.store import VectorStore
from simskip_vdb.upkeep import status

SCAN_ROWS = 8192
SAMPLE = 20_000  # rows that hubness is measured on, taken evenly
FEWEST = 2  # rows that a fit can compare
PROBES = 1_000  # rows of the sample whose neighbours are counted
NEIGHBOURS = 10


def inspect(
    store: VectorStore, state: Path | None = None, *, progress: Progress = silent
) -> dict[str, Any]:
    """Read every row once and describe the index.

    Hubness is the skewness of how often a row is among the ten nearest of others (Radovanović et
    al., JMLR 2010), on a sample of 20,000 rows; above about 1 a few rows crowd the results.

    Args:
        store: The index.
        state: Its state folder, if not the usual one.
        progress: Called with rows done and rows in all.

    Returns:
        Plain JSON values.
    """
    info = store.info()
    tally = _Tally(info.count)
    for batch in store.scan(SCAN_ROWS):
        tally.add(batch)
        progress("inspect", tally.rows, info.count)
    past, problem = _past(store, state)
    return {
        "schema": 1,
        "index": info.uri,
        "kind": info.kind,
        "rows": info.count,
        "dim": info.dim,
        "metric": info.metric.value,
        "ids": "positions" if info.positional else "explicit",
        "readable": _readable(info),
        "parameters": dict(info.details),
        "norms": tally.norms(),
        "duplicate_ids": tally.duplicate_ids(),
        "duplicate_vectors": tally.duplicate_vectors(),
        "bad_rows": tally.bad_rows(),
        "hubness": _hubness(tally.sample(), info.metric.value),
        "refined": past["refined"],
        "state_problem": problem,
        "next": _next_steps(info, tally, past),
    }


def _past(store: VectorStore, state: Path | None) -> tuple[Mapping[str, Any], str | None]:
    """Return what was done to an index; and why, where its state does not tell."""
    try:
        return status(store, state=state), None
    except (StoreError, JournalError) as error:
        return {"refined": None, "copy_of": None}, str(error)


def render(result: Mapping[str, Any]) -> str:
    """Lay an inspection out for people."""
    bad = result["bad_rows"]
    norms = result["norms"]
    lines = [
        f"{result['index']} · {result['kind']}",
        f"rows         {result['rows']:,} × {result['dim']}, {result['metric']}",
        f"ids          {result['ids']}"
        + (f", {result['duplicate_ids']:,} duplicates" if result["duplicate_ids"] else ""),
        f"readable     {result['readable']}",
    ]
    if result["parameters"]:
        shown = ", ".join(f"{name} {value}" for name, value in result["parameters"].items())
        lines.append(f"parameters   {shown}")
    if norms is not None:
        lines.append(
            f"norms        {norms['min']:.4g} to {norms['max']:.4g}, median {norms['median']:.4g}"
        )
    lines.append(f"duplicates   {result['duplicate_vectors']:,} rows equal an earlier row")
    lines.append(
        f"bad rows     {bad['not_finite']:,} not finite, {bad['zero']:,} zero"
        + (f", {bad['absurd']:,} absurdly long or short" if "absurd" in bad else "")
        + (f" (ids {', '.join(map(str, bad['examples']))})" if bad["examples"] else "")
    )
    if result["hubness"] is not None:
        hub = result["hubness"]
        lines.append(
            f"hubness      skewness {hub['skewness']:.2f}; the top 1 % of rows fill "
            f"{number(hub['top_percent_share'])} of all top-{NEIGHBOURS} places"
        )
    if result["state_problem"] is not None:
        lines.append(f"state        {result['state_problem']}")
    lines += ["", "next:", *(f"  {step}" for step in result["next"])]
    return "\n".join(lines)


class _Tally:
    """Running counts over batches, 28 bytes a row beside the sample."""

    def __init__(self, count: int) -> None:
        self.rows = 0
        self._step = max(1, count // SAMPLE)
        self._ids: list[Any] = []
        self._digests: list[Any] = []
        self._norms: list[Any] = []
        self._sample: list[Vectors] = []

    def add(self, batch: VectorBatch) -> None:
        wide = batch.vectors.astype(np.float64)
        self._ids.append(batch.ids)
        self._digests.append(row_digests(batch.vectors))
        with np.errstate(invalid="ignore"):
            self._norms.append(np.sqrt(np.einsum("ij,ij->i", wide, wide)))
        self._sample.append(batch.vectors[(-self.rows) % self._step :: self._step].copy())
        self.rows += len(batch)

    def norms(self) -> dict[str, float] | None:
        norms = self._all(self._norms)
        norms = norms[np.isfinite(norms)]
        if not len(norms):
            return None
        return {
            "min": float(norms.min()),
            "median": float(np.median(norms)),
            "max": float(norms.max()),
        }

    def duplicate_ids(self) -> int:
        return self.rows - len(np.unique(self._all(self._ids)))

    def duplicate_vectors(self) -> int:
        return self.rows - len(np.unique(self._all(self._digests)))

    def bad_rows(self) -> dict[str, Any]:
        norms, ids = self._all(self._norms), self._all(self._ids)
        not_finite, zero = ~np.isfinite(norms), norms == 0
        absurd = ~(not_finite | zero) & ((norms < SOUND[0]) | (norms > SOUND[1]))
        return {
            "not_finite": int(not_finite.sum()),
            "zero": int(zero.sum()),
            **({"absurd": int(absurd.sum())} if absurd.any() else {}),
            "examples": id_names(ids[not_finite | zero | absurd][:3]),
        }

    def usable(self) -> int:
        """Return how many rows can be compared."""
        bad = {name: count for name, count in self.bad_rows().items() if name != "examples"}
        return self.rows - int(sum(bad.values()))

    def sample(self) -> Vectors:
        sample: Vectors = self._all(self._sample)
        return sample

    @staticmethod
    def _all(parts: list[Any]) -> Any:  # noqa: ANN401 arrays of several dtypes
        return np.concatenate(parts) if parts else np.empty(0)


def _hubness(sample: Vectors, metric: str) -> dict[str, float] | None:
    from simskip_vdb.datatypes import Metric

    usable = sample[usable_vectors(sample)] if len(sample) else sample
    if len(usable) <= NEIGHBOURS:
        return None
    probes = usable[:: max(1, len(usable) // PROBES)]
    found = exact_search(probes, [(0, usable)], NEIGHBOURS + 1, Metric(metric)).ids[:, 1:]
    counts = np.bincount(found[found >= 0], minlength=len(usable)).astype(np.float64)
    spread = counts.std()
    top = np.sort(counts)[-max(1, len(counts) // 100) :]
    return {
        "skewness": float(((counts - counts.mean()) ** 3).mean() / spread**3) if spread else 0.0,
        "top_percent_share": float(top.sum() / counts.sum()),
    }


def _readable(info: StoreInfo) -> str:
    if info.lossy:
        return "lossy codes: refining needs the exact vectors (--originals)"
    if info.exact:
        return "exactly"
    return f"within a relative error of {info.rounding:g}"


def _next_steps(info: StoreInfo, tally: _Tally, past: Mapping[str, Any]) -> list[str]:
    quoted = shlex.quote(info.uri)
    uri = f"{quoted} --originals FILE.npy" if info.lossy else quoted
    ids, groups = "--doc-ids D.txt", "--labels LABELS.txt"
    if info.payload:
        ids = "--doc-id-field FIELD" if info.document_ids is None else ""
        groups = "--group-field FIELD"
    steps = []
    if past["copy_of"]:
        return [f"this is a refined copy; refine the original: simskip inspect {past['copy_of']}"]
    if past["refined"] is not None:
        steps += [f"simskip status {quoted}", f"simskip rollback {quoted}"]
    if tally.usable() < FEWEST:
        many = (
            f"{tally.rows} rows"
            if tally.rows == tally.usable()
            else (f"{tally.usable()} of {tally.rows} rows that are not bad")
        )
        steps.append(f"add rows: {many} are too few to compare")
        return steps
    if tally.duplicate_ids():
        steps.append("give every row an id of its own: ids that repeat cannot be refined")
        return steps
    steps += [
        f"simskip refine {uri} --queries Q.npy --query-ids Q.txt --qrels QRELS.tsv {ids}".rstrip(),
        f"simskip refine {uri} {groups}      (groups instead of judgments)",
    ]
    return steps
