"""Refine, verify and roll back every kind of FAISS index, and write the table of what each can do.

    python benchmarks/faiss_types.py [--only PART-OF-A-NAME] [--missing] [--table]

Writes ``results/faiss_types.json`` and the table in ``docs/faiss.md``. The rows are 20,000
vectors of 128 numbers, 16 of which are free.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import faiss
import machine
import numpy as np
from faiss_cells import CELLS, FULL, Cell, Expect, Rows, ids_of

import simskip_vdb as ss
from simskip_vdb import pipeline, through_index
from simskip_vdb.datatypes import Metric, Side
from simskip_vdb.durable import sha256_of
from simskip_vdb.errors import DataError, SimskipError, UnsupportedIndexError

DOCS = Path(__file__).resolve().parents[1] / "docs" / "faiss.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="")
    parser.add_argument("--missing", action="store_true", help="only what has no result yet")
    parser.add_argument("--table", action="store_true", help="only the table")
    options = parser.parse_args()
    path = machine.RESULTS / "faiss_types.json"
    known = json.loads(path.read_text())["cells"] if path.exists() else {}
    chosen = [] if options.table else [cell for cell in CELLS if options.only in cell.name]
    if options.missing:
        chosen = [cell for cell in chosen if cell.name not in known]
    rows = make_rows()
    # With 200 probes, chance alone moves the ann_recall of coarse codes by .01.
    through_index.ANN_PROBES = 2000
    for cell in chosen:
        known[cell.name] = found = prove(cell, rows)
        print(f"{cell.name}: {found.get('ann_recall', found.get('refusal'))}", flush=True)
        cells = {cell.name: known[cell.name] for cell in CELLS if cell.name in known}
        machine.save("faiss_types", {"rows": FULL.rows, "dim": FULL.dim, "cells": cells})
    machine.put(DOCS, "faiss_types", table(known))


def make_rows() -> Rows:
    """Return rows of unit length around 200 centres, of 16 free dimensions and some noise."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((200, 16))
    free = centres[rng.integers(0, 200, FULL.rows)] + 0.5 * rng.standard_normal((FULL.rows, 16))
    rows = free @ rng.standard_normal((16, FULL.dim))
    rows += 0.3 * rng.standard_normal(rows.shape)
    unit: Rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    return unit


def prove(cell: Cell, rows: Rows) -> dict[str, Any]:
    """Refine, verify and roll back one kind; return what happened.

    Raises:
        AssertionError: It is not what `cell` expects.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        path, refiner = folder / "rows.faiss", folder / "refiner"
        index = cell.build(FULL, rows)
        faiss.write_index(index, str(path))
        np.save(folder / "originals.npy", rows)
        np.savetxt(folder / "ids.txt", ids_of(cell, len(rows)), fmt="%d")
        # Not the cell's: FAISS's factory forgets the metric of some types.
        metric = Metric.DOT if index.metric_type == faiss.METRIC_INNER_PRODUCT else Metric.EUCLID
        make_refiner(metric).save(refiner)
        before = sha256_of(path)
        result: dict[str, Any] = {"factory": _factory(cell), "expect": cell.expect.value}
        settings = ss.Settings(
            refiner=refiner, accept_unmeasured=True, search_params=dict(cell.params)
        )
        if cell.expect is not Expect.REFINES:
            result["refusal"] = _refusal(path, settings)
            assert sha256_of(path) == before
        if cell.expect is not Expect.REFUSES:
            originals = folder / "originals.npy" if result.get("refusal") else None
            result |= _refine_and_restore(path, settings, originals)
            assert sha256_of(path) == before
        assert not cell.reason or cell.reason in result["refusal"]
        return result


def make_refiner(metric: Metric) -> ss.Refiner:
    """Return a refiner that turns every row a little, and smoothly."""
    rng = np.random.default_rng(1)
    dim = FULL.dim
    shapes = ((dim // 2, dim), (dim, dim // 2), (dim, dim))
    layers = tuple(
        (
            (rng.standard_normal(shape) / np.sqrt(shape[1])).astype(np.float32),
            np.zeros(shape[0], np.float32),
        )
        for shape in shapes
    )
    return ss.Refiner(
        dim=dim,
        side=Side.DOCS,
        metric=metric,
        alpha=0.3,
        beta=0.0,
        layers=layers,
        offset_ids=np.empty(0, np.int64),
        offsets=np.empty((0, dim), np.float32),
    )


def _factory(cell: Cell) -> str:
    return cell.factory.format(**{name: getattr(FULL, name) for name in type(FULL).__slots__})


def _refusal(path: Path, settings: ss.Settings) -> str:
    try:
        pipeline.refine(ss.open_store(str(path)), ss.Judgments(), settings)
    except SimskipError as error:
        refused = error
    else:
        raise AssertionError(f"{path} was not refused")
    assert isinstance(refused, (UnsupportedIndexError, DataError))
    return str(refused).replace(f"faiss:{path}: ", "")


def _refine_and_restore(
    path: Path, settings: ss.Settings, originals: Path | None
) -> dict[str, Any]:
    store = ss.open_store(str(path), originals=originals, originals_ids=_ids(path, originals))
    start = time.perf_counter()
    report = pipeline.refine(store, ss.Judgments(), settings)
    seconds = time.perf_counter() - start
    assert report.gate is not None
    assert report.written is not None
    assert report.ann_recall is not None
    info = store.info()
    passed = report.gate.passed
    return {
        "kind": report.kind,
        "reads": "exactly" if info.exact else "coarsely" if info.lossy else "nearly",
        "rows": report.rows,
        "moved": report.written["rows"],
        "ann_recall": {when: round(value, 4) for when, value in report.ann_recall.items()},
        "gate": list(report.gate.reasons),
        "restored": passed and ss.rollback(ss.open_store(str(path)))["exact"],
        "seconds": round(seconds, 1),
    }


def _ids(path: Path, originals: Path | None) -> Path | None:
    return None if originals is None else path.with_name("ids.txt")


def table(cells: Mapping[str, Any]) -> str:
    """Lay results out as a table in Markdown."""
    lines = [
        "| index | factory string | rows are read | ann_recall@10 before → after | it refines |",
        "|---|---|---|---|---|",
    ]
    for name, found in cells.items():
        recall = found.get("ann_recall")
        shown = f"{recall['before']:.3f} → {recall['after']:.3f}" if recall else "–"
        outcome = {
            Expect.REFINES: "yes",
            Expect.NEEDS_ORIGINALS: "with `--originals`",
            Expect.REFUSES: f"no: {_reason(found.get('refusal', ''))}",
        }[Expect(found["expect"])]
        if recall and not found["restored"]:
            outcome = "no: here the gate refused, as it found fewer neighbours"
        lines.append(
            f"| {name} | `{found['factory']}` | {found.get('reads', '–')} | {shown} | {outcome} |"
        )
    return "\n".join(lines) + "\n"


def _reason(refusal: str) -> str:
    return refusal.partition("cannot be refined: ")[2] or refusal


if __name__ == "__main__":
    main()
