"""The whole job over the engines of Qdrant that run in this process."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engines import ALIAS, COLLECTION, DIM, OTHER, ROWS, VECTOR, Client, Edge, Engine, Rows

import simskip_vdb as ss
from simskip_vdb import FitSettings, Refiner, Settings
from simskip_vdb.connectors.qdrant_store import QdrantStore
from simskip_vdb.datatypes import Side
from simskip_vdb.errors import ConfigError, JournalError
from simskip_vdb.judgments import Judgments
from simskip_vdb.report import Report, render, render_prune
from simskip_vdb.rows import Rows as SavedRows

BESIDE = f"{VECTOR}@simskip"


@pytest.fixture(scope="module")
def refiner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A refiner that was fitted once for all, with the report of the run that fitted it."""
    engine = Edge(tmp_path_factory.mktemp("fitted"))
    report = refine(engine, Settings(out=engine.folder / "refiner"))
    assert report.gate is not None
    assert report.gate.passed, report.gate.reasons
    return engine.folder / "refiner"


@pytest.fixture(params=["edge", "memory"])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Engine:
    return Edge(tmp_path) if request.param == "edge" else Client(tmp_path)


def judgments(engine: Engine) -> Judgments:
    return ss.read_judgments(engine.files, doc_id_field="sku")


def refine(engine: Engine, settings: Settings) -> Report:
    with engine.open() as store:
        return ss.refine(store, judgments(engine), replace(settings, state=engine.state))


def rollback(engine: Engine) -> dict[str, Any]:
    with engine.open() as store:
        return ss.rollback(store, state=engine.state)


def status(engine: Engine) -> dict[str, Any]:
    with engine.open(read_only=True) as store:
        return ss.status(store, state=engine.state)


def assert_same(rows: Rows, expected: Rows, tolerance: float = 2e-5) -> None:
    assert set(rows) == set(expected)
    for name, row in expected.items():
        np.testing.assert_allclose(rows[name], row, atol=tolerance, err_msg=name)


def refined(engine: Engine, refiner: Path, originals: Rows) -> Rows:
    names = np.array(list(originals), "S36")
    moved = Refiner.load(refiner).refine_rows(np.stack(list(originals.values())), names)
    return dict(zip(originals, moved, strict=True))


def test_refine_in_place_and_back(engine: Engine, refiner: Path) -> None:
    before, rest = engine.rows(), engine.digest(VECTOR)
    report = refine(engine, Settings(refiner=refiner))
    assert report.gate is not None
    assert report.gate.passed, report.gate.reasons
    assert report.measures["nDCG@10"]["delta"] > 0.03
    assert report.written is not None
    assert (report.written["rows"], report.written["mode"]) == (ROWS, "in-place")
    assert_same(engine.rows(), refined(engine, refiner, before))
    assert engine.digest(VECTOR) == rest
    assert "read back and verified" in render(report.to_dict())
    now = status(engine)
    assert now["refined"]["refiner"] == Refiner.load(refiner).id
    assert (now["changed_since"], now["interrupted"]) == (False, False)
    with engine.open() as store:
        assert store.marker()["refiner"] == Refiner.load(refiner).id
    again = refine(engine, Settings(refiner=refiner))
    assert again.written is not None
    assert again.written["mode"] == "none"
    assert "nothing to do" in again.notes[0]
    done = rollback(engine)
    assert (done["exact"], done["restored"], done["kept"]) == (True, ROWS, 0)
    assert_same(engine.rows(), before, 0 if isinstance(engine, Edge) else 2e-5)
    assert engine.digest(VECTOR) == rest
    with engine.open() as store:
        assert store.marker() is None
    with pytest.raises(ConfigError, match="nothing to roll back"):
        rollback(engine)


def test_path_mode_is_refined_too(refiner: Path, tmp_path: Path) -> None:
    engine = Client(tmp_path, path=True)
    before = engine.rows()
    with engine.open() as store:
        settings = Settings(refiner=refiner)
        report = ss.refine(store, judgments(engine), settings)
        state = tmp_path / "db.simskip" / ALIAS / VECTOR
        assert store.info().state == state
        assert (state / "manifest.json").is_file()
    assert report.written is not None
    assert report.written["rows"] == ROWS
    with engine.open() as store:
        assert ss.rollback(store)["restored"] == ROWS
    assert_same(engine.rows(), before)


def test_a_new_vector_stands_beside(engine: Engine, refiner: Path) -> None:
    before, rest = engine.rows(), engine.digest(BESIDE)
    report = refine(engine, Settings(refiner=refiner, mode="new-vector"))
    assert report.written is not None
    assert (report.written["rows"], report.written["target"]) == (ROWS, BESIDE)
    assert engine.digest(BESIDE) == rest
    assert_same(engine.rows(BESIDE), refined(engine, refiner, before))
    again = refine(engine, Settings(refiner=refiner, mode="new-vector"))
    assert "nothing to do" in again.notes[0]
    with pytest.raises(ConfigError, match="roll it back first"):
        refine(engine, Settings(refiner=refiner))
    assert not status(engine)["changed_since"]
    assert rollback(engine)["exact"]
    assert engine.rows(BESIDE) == {}
    assert engine.digest() == rest


def test_a_second_run_improves_on_what_the_application_gets(engine: Engine) -> None:
    both = Settings(fit=FitSettings(side=Side.BOTH), mode="new-vector")
    first = refine(engine, both)
    assert first.written is not None
    second = refine(engine, replace(both, fit=replace(both.fit, seed=1)))
    was, now = first.measures["nDCG@10"], second.measures["nDCG@10"]
    assert was["delta"] > 0.01
    assert abs(now["before"] - was["after"]) < 0.002


def test_a_new_vector_follows_rows_that_change(engine: Engine, refiner: Path) -> None:
    refine(engine, Settings(refiner=refiner, mode="new-vector"))
    newer = np.eye(DIM, dtype=np.float32)[0]
    engine.move(engine.points[3], newer)
    report = refine(engine, Settings(refiner=refiner, mode="new-vector"))
    if report.gate is not None and report.gate.passed:
        assert_same(engine.rows(BESIDE), refined(engine, refiner, engine.rows()))
    assert engine.rows()[str(engine.points[3])].tolist() == newer.tolist()


def test_a_service_checks_its_refiner(engine: Engine, refiner: Path) -> None:
    loaded, other = Refiner.load(refiner), Refiner.identity(DIM)
    with engine.open() as store, pytest.raises(ConfigError, match="holds originals"):
        loaded.check(store)
    refine(engine, Settings(refiner=refiner))
    with engine.open() as store:
        loaded.check(store)
        with pytest.raises(ConfigError, match=f"rows refined by {loaded.id}"):
            other.check(store)
        with pytest.raises(ConfigError, match="3 dimensions"):
            Refiner.identity(3).check(store)


def test_pruning_keeps_what_undoes(engine: Engine, refiner: Path) -> None:
    before = engine.rows()
    refine(engine, Settings(refiner=refiner))
    spare = engine.state / "refiners" / "spare"
    Refiner.identity(DIM).save(spare)
    with engine.open() as store:
        done = ss.prune(store, state=engine.state)
    assert done["removed"] == ["refiners/spare"]
    assert done["bytes"] > 0
    assert "freed" in render_prune(done)
    assert rollback(engine)["exact"]
    assert_same(engine.rows(), before)


def test_side_both_leaves_the_vectors_of_raw_queries_alone(engine: Engine, refiner: Path) -> None:
    both = Settings(fit=FitSettings(side=Side.BOTH))
    with pytest.raises(ConfigError, match="new-vector or new-collection"):
        refine(engine, both)


def test_a_new_collection_takes_over_by_its_alias(refiner: Path, tmp_path: Path) -> None:
    engine = Client(tmp_path)
    before, rest = engine.rows(), engine.digest(VECTOR)
    report = refine(engine, Settings(refiner=refiner, mode="new-collection"))
    assert report.written is not None
    name = report.written["target"]
    assert engine.leads_to() == name != COLLECTION
    assert_same(engine.rows(), refined(engine, refiner, before))
    assert engine.digest(VECTOR) == rest
    again = refine(engine, Settings(refiner=refiner, mode="new-collection"))
    assert "nothing to do" in again.notes[0]
    done = rollback(engine)
    assert done["exact"]
    assert engine.leads_to() == COLLECTION
    assert [c.name for c in engine.client.get_collections().collections] == [COLLECTION]
    assert_same(engine.rows(), before)


def test_going_back_from_a_collection_that_lives_on_loses_nothing(
    refiner: Path, tmp_path: Path
) -> None:
    engine = Client(tmp_path)
    before = engine.rows()
    refine(engine, Settings(refiner=refiner, mode="new-collection"))
    copy = engine.leads_to()
    new = {VECTOR: np.eye(DIM)[1].tolist(), OTHER: [1.0, 2.0, 3.0]}
    engine.put([(10**7, new, {"sku": "new"})])
    engine.client.set_payload(ALIAS, {"version": 2}, [engine.points[1]])
    done = rollback(engine)
    assert (done["restored"], done["kept"]) == (ROWS, 1)
    assert engine.leads_to() == copy
    rows = engine.rows()
    assert rows.pop(str(10**7)).tolist() == np.eye(DIM, dtype=np.float32)[1].tolist()
    assert_same(rows, before)
    payloads = {name: payload for name, _, payload in engine.everything()}
    assert payloads[str(engine.points[1])]["version"] == 2


def test_only_an_alias_can_be_switched(refiner: Path, tmp_path: Path) -> None:
    engine = Client(tmp_path)
    store = QdrantStore(engine.client, COLLECTION, VECTOR)
    settings = Settings(refiner=refiner, mode="new-collection", state=engine.state)
    with pytest.raises(ConfigError, match="alias"):
        ss.refine(store, judgments(engine), settings)
    assert store.marker() is None


def test_judgments_by_lot_write_nothing(tmp_path: Path) -> None:
    engine = Edge(tmp_path, gain=False)
    rest = engine.digest()
    report = refine(engine, Settings())
    assert report.gate is not None
    assert not report.gate.passed
    assert report.exit_code == 3
    assert engine.digest() == rest


def test_groups_come_from_a_payload_field(tmp_path: Path) -> None:
    engine = Edge(tmp_path)
    with engine.open() as store:
        grouped = ss.read_judgments(ss.JudgmentFiles(), group_field="category")
        report = ss.refine(store, grouped, Settings(state=engine.state))
    assert report.measure == "Rprec"
    assert report.queries["test"] > 30


def test_a_filter_narrows_everything_to_one_tenant(engine: Engine, refiner: Path) -> None:
    before, rest = engine.rows(), engine.digest(VECTOR)
    tenant = {"must": [{"key": "category", "match": {"value": "c3"}}]}
    theirs = {str(p) for p, load in zip(engine.points, engine.payloads, strict=True)
              if load["category"] == "c3"}  # fmt: skip
    with engine.open(filter=tenant) as store:
        settings = Settings(refiner=refiner, state=engine.state, accept_unmeasured=True)
        report = ss.refine(store, Judgments(), settings)
    assert report.rows == len(theirs) < ROWS
    expected = refined(engine, refiner, before)
    assert_same(engine.rows(), {n: (expected if n in theirs else before)[n] for n in before})
    assert engine.digest(VECTOR) == rest
    with engine.open() as store, pytest.raises(ConfigError, match="under the filter"):
        ss.refine(store, judgments(engine), Settings(refiner=refiner, state=engine.folder / "all"))
    with engine.open(filter=tenant) as store:
        assert ss.rollback(store, state=engine.state)["exact"]
    assert_same(engine.rows(), before)


def test_originals_of_rows_that_leave_the_filter_are_kept(
    refiner: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = Client(tmp_path)
    tenant = {"must": [{"key": "category", "match": {"value": "c3"}}]}
    before = engine.rows()
    settings = Settings(refiner=refiner, state=engine.state, accept_unmeasured=True)
    with engine.open(filter=tenant) as store:
        ss.refine(store, Judgments(), settings)
    leaver = next(
        point
        for point, load in zip(engine.points, engine.payloads, strict=True)
        if load["category"] == "c3"
    )
    engine.client.set_payload(ALIAS, {"category": "c4"}, [leaver])
    with engine.open(filter=tenant) as store:
        ss.rollback(store, state=engine.state)
    assert "1 rows that were refined do not pass the filter any more" in caplog.text
    (kept,) = engine.state.glob("unseen-*.arrow")
    rows = SavedRows(kept)
    assert rows.ids.tolist() == [str(leaver).encode()]
    np.testing.assert_allclose(rows.matrix()[0], before[str(leaver)], atol=1e-5)


def test_a_marker_without_its_state_is_an_error(engine: Engine, refiner: Path) -> None:
    refine(engine, Settings(refiner=refiner))
    held = engine.rows()
    lost = engine.folder / "lost"
    engine.state.rename(lost)
    with pytest.raises(JournalError, match=r"as refined|is gone"):
        refine(engine, Settings(refiner=refiner))
    with pytest.raises((JournalError, ConfigError), match=r"as refined|never refined|is gone"):
        rollback(engine)
    assert_same(engine.rows(), held, 0)
    if engine.state.exists():
        shutil.rmtree(engine.state)
    lost.rename(engine.state)
    assert rollback(engine)["restored"] == ROWS


def test_documents_are_named_by_point_ids_where_no_field_is(engine: Engine) -> None:
    names = dict(zip((load["sku"] for load in engine.payloads), map(str, engine.points),
                     strict=True))  # fmt: skip
    path = Path(str(engine.files.qrels))
    lines = [line.split("\t") for line in path.read_text().splitlines()]
    path.write_text(
        "".join("\t".join((q, names.get(doc, doc), grade)) + "\n" for q, doc, grade in lines)
    )
    with engine.open() as store:
        given = ss.read_judgments(engine.files)
        report = ss.refine(store, given, Settings(state=engine.state, dry_run=True))
    assert report.forecast is not None
    assert report.forecast["rows"] == ROWS
    assert report.forecast["engine_bytes"] == ROWS * DIM * 4
    assert "until it is optimised" in render(report.to_dict())
    assert report.queries["fit"] > 100


def test_a_field_that_no_row_has_is_named(engine: Engine) -> None:
    given = ss.read_judgments(engine.files, doc_id_field="no_such")
    with engine.open() as store, pytest.raises(ConfigError, match="no_such"):
        ss.refine(store, given, Settings(state=engine.state))
