"""Rows that are finite and yet no embeddings, and indexes of which nothing can be learnt."""

from __future__ import annotations

from pathlib import Path

import faiss
import numpy as np
import pytest
from judged import make_case
from script import simskip, simskip_json

from simskip_vdb.datatypes import Metric
from simskip_vdb.search import exact_search

DIM = 16


def saved(path: Path, rows: object, metric: int = faiss.METRIC_INNER_PRODUCT) -> Path:
    index = faiss.IndexFlat(DIM, metric)
    index.add(np.asarray(rows, np.float32))
    faiss.write_index(index, str(path))
    return path


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("metric", list(Metric))
@pytest.mark.parametrize("value", [3e37, 1e20, 1e-30])
def test_exact_search_survives_what_float32_cannot_square(metric: Metric, value: float) -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((400, DIM)).astype(np.float32)
    queries = rng.standard_normal((30, DIM)).astype(np.float32)
    rows[7] = value * np.sign(rng.standard_normal(DIM))
    found = exact_search(queries, [(0, rows)], 10, metric).ids
    q, r = queries.astype(np.float64), rows.astype(np.float64)
    scores = q @ r.T
    if metric is Metric.COSINE:
        scores /= np.linalg.norm(q, axis=1)[:, None] * np.linalg.norm(r, axis=1)
    elif metric is Metric.EUCLID:
        scores = -((q[:, None] - r) ** 2).sum(axis=2)
    np.testing.assert_array_equal(found, np.argsort(-scores, axis=1, kind="stable")[:, :10])


@pytest.mark.parametrize("value", [3e37, 1e-30])
def test_an_absurd_row_is_counted_and_not_learnt_from(tmp_path: Path, value: float) -> None:
    case = make_case(tmp_path / "case")
    index = faiss.read_index(str(case.index))
    odd = np.full((1, DIM), value, np.float32)
    index.add_with_ids(odd, np.array([10**6]))
    faiss.write_index(index, str(case.index))
    seen = simskip_json("inspect", case.index)
    assert (seen["bad_rows"]["absurd"], seen["bad_rows"]["examples"]) == (1, ["1000000"])
    options = list(case.options)
    ids = options[options.index("--doc-ids") + 1]
    if "\t" not in Path(ids).read_text().splitlines()[0]:
        options = options[: options.index("--doc-ids")] + options[options.index("--doc-ids") + 2 :]
    done = simskip("refine", case.index, *options)
    # One row of such a length may hide what is gained, and then the gate refuses.
    assert done.returncode in (0, 3), done.stderr + done.stdout
    assert "gate: " in done.stdout
    assert "1 rows are NaN, infinite, zero, or absurdly" in done.stdout
    assert "Warning" not in done.stderr


@pytest.mark.parametrize("value", [0.0, np.nan, 1e30])
def test_nothing_is_proposed_where_no_row_can_be_compared(tmp_path: Path, value: float) -> None:
    path = saved(tmp_path / "i.faiss", np.full((5, DIM), value))
    found = simskip_json("inspect", path)
    assert found["next"] == ["add rows: 0 of 5 rows that are not bad are too few to compare"]


def test_nothing_is_proposed_for_an_empty_index(tmp_path: Path) -> None:
    path = saved(tmp_path / "i.faiss", np.empty((0, DIM)))
    assert simskip_json("inspect", path)["next"] == ["add rows: 0 rows are too few to compare"]
