"""A night over the engines: only what is new is written, and only a better refiner takes over."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from builders import change, random_refiner
from engines import DIM, ROWS, VECTOR, Client, Edge, Engine
from judged import Case, make_case

import simskip_vdb as ss
from simskip_vdb import Refiner, Settings
from simskip_vdb.attempts import Attempt, judged_digests
from simskip_vdb.datatypes import JudgedQueries, Split, silent
from simskip_vdb.errors import JournalError, StateInUseError, StoppedError
from simskip_vdb.job import Refit
from simskip_vdb.journal import Journal
from simskip_vdb.judgments import Judgments
from simskip_vdb.ledger import FIRST_LEVEL, Ledger
from simskip_vdb.measuring import measure
from simskip_vdb.night import plan_night, run_night
from simskip_vdb.refiner import LateRule
from simskip_vdb.rows import Rows
from simskip_vdb.runs import Runs
from simskip_vdb.statistics import compare
from simskip_vdb.workspace import open_workspace

NEVER = Refit(new_judgments=1.0, max_age_days=float("inf"), drift=False)
GROWING = Settings(growing=True)


def near(a: Any, b: Any, tolerance: float = 2e-5) -> bool:  # noqa: ANN401
    return bool(np.allclose(a, b, rtol=0, atol=tolerance))


@pytest.fixture(params=["edge", "memory"])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engine]:
    engine = Edge(tmp_path) if request.param == "edge" else Client(tmp_path)
    yield engine
    engine.close()


def night(engine: Engine, refit: Refit = NEVER, **options: Any) -> dict[str, Any]:  # noqa: ANN401
    judgments = ss.read_judgments(engine.files, doc_id_field="sku")
    settings = replace(GROWING, state=engine.state)
    with engine.open() as store:
        return run_night(store, judgments, settings, refit, **options)


def with_rule(engine: Engine, rule: LateRule) -> Refiner:
    """Refine an engine's index by a refiner that treats late rows by this rule."""
    judgments = ss.read_judgments(engine.files, doc_id_field="sku")
    settings = Settings(state=engine.state)
    with engine.open() as store:
        report = ss.fit(store, judgments, settings)
        assert report.refiner is not None
        fitted = Refiner.load(report.refiner["path"])
        folder = engine.folder / "given"
        replace(fitted, late=rule).save(folder)
        done = ss.refine(store, judgments, replace(settings, refiner=folder))
    assert done.gate is not None
    assert done.gate.passed, done.gate.reasons
    given = Refiner.load(folder)
    # As after a fit: nothing is due until something changes.
    digests = judged_digests(judgments)
    Attempt(time=time.time(), refiner=given.id, judged=digests).save(engine.state)
    return given


def unit(rng: np.random.Generator, rows: int) -> np.ndarray:
    x = rng.normal(size=(rows, DIM))
    return np.asarray(x / np.linalg.norm(x, axis=1, keepdims=True), np.float32)


@pytest.mark.parametrize("rule", list(LateRule))
def test_only_what_is_new_or_changed_is_written(
    engine: Engine, rule: LateRule, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    refiner = with_rule(engine, rule)
    refined = engine.rows()
    came = unit(rng, 4)
    other = np.ones(3).tolist()
    new = [2_000_000 + i for i in range(3)]
    engine.put(
        [
            (point, {VECTOR: row.tolist(), "image": other}, {"sku": f"new-{point}"})
            for point, row in zip(new, came[:3], strict=True)
        ]
    )
    moved, gone = engine.points[5], [engine.points[7], engine.points[8]]
    engine.move(moved, came[3])
    engine.remove(gone)

    with engine.open() as store:
        kind = type(store)
    update, sent = kind.update, []

    def counted(self: Any, batch: Any, allowed: Any) -> Any:  # noqa: ANN401
        sent.extend(batch.ids.tolist())
        return update(self, batch, allowed)

    monkeypatch.setattr(kind, "update", counted)
    found = night(engine)

    assert found["outcome"] == "written"
    assert found["rows"]["total"] == ROWS + 1
    assert (found["rows"]["new"], found["rows"]["changed"], found["rows"]["deleted"]) == (3, 1, 2)
    late = refiner.refine_rows(
        came, np.array(["-"] * 4, "S44"), np.ones(4, np.bool_)
    )  # no offset, by the rule
    if rule is LateRule.RAW:
        assert near(late, came)
    expected = {name: row for name, row in refined.items() if name not in map(str, gone)}
    expected |= dict(zip(map(str, [*new, moved]), late, strict=True))
    now = engine.rows()
    assert set(now) == set(expected)
    assert all(near(now[name], row) for name, row in expected.items())
    asked = {str(name, "ascii") for name in sent}
    assert asked == (set() if rule is LateRule.RAW else {*map(str, new), str(moved)})

    sent.clear()
    again = night(engine)
    assert again["outcome"] == "quiet"
    assert not sent
    originals = Rows(next(engine.state.glob("originals-*.arrow")))
    assert set(originals.ids.astype("U").tolist()) == set(expected)  # deleted rows left the state
    with engine.open() as store:
        back = ss.rollback(store, state=engine.state)
    assert back["exact"]
    raw = dict(zip(map(str, engine.points), engine.docs, strict=True))
    raw |= dict(zip(map(str, [*new, moved]), came, strict=True))
    assert all(near(row, raw[name]) for name, row in engine.rows().items())


def test_a_quiet_night_scans_once_and_writes_nothing(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_rule(engine, LateRule.F)
    with engine.open() as store:
        kind = type(store)
    scan, scans = kind.scan, []

    def counted(self: Any, *args: Any, **options: Any) -> Any:  # noqa: ANN401
        scans.append(args)
        return scan(self, *args, **options)

    def forbidden(*_: Any) -> None:  # noqa: ANN401
        raise AssertionError("a quiet night wrote")

    monkeypatch.setattr(kind, "scan", counted)
    monkeypatch.setattr(kind, "update", forbidden)
    before = {path.name for path in engine.state.iterdir()}
    assert night(engine)["outcome"] == "quiet"
    assert len(scans) == 1
    assert {path.name for path in engine.state.iterdir()} == before
    assert [run["outcome"] for run in Runs(engine.state).read()] == ["written", "quiet"]


def test_a_night_that_was_stopped_goes_on_where_it_was(engine: Engine) -> None:
    def stop(stage: str, done: int, total: int) -> None:
        if stage == "write":
            raise StoppedError("enough")

    judgments = ss.read_judgments(engine.files, doc_id_field="sku")
    settings = Settings(state=engine.state)
    with engine.open() as store, pytest.raises(StoppedError):
        ss.refine(store, judgments, settings, progress=stop)
    with engine.open() as store:
        assert ss.status(store, state=engine.state)["interrupted"]
    found = night(engine)
    assert found["outcome"] in ("quiet", "kept")
    outcomes = [run["outcome"] for run in Runs(engine.state).read()]
    assert outcomes[0] == "written"
    with engine.open() as store:
        status = ss.status(store, state=engine.state)
    assert not status["interrupted"]
    assert status["refined"] is not None
    assert not status["changed_since"]


# On one FAISS file


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """An index after its first night."""
    case = make_case(tmp_path_factory.mktemp("night"))
    found = run_night(ss.open_store(str(case.index)), read(case), GROWING, Refit())
    assert found["outcome"] == "written"
    assert found["refit"]["reasons"] == ["no refiner was fitted yet"]
    return case


@pytest.fixture
def case(fitted: Case, tmp_path: Path) -> Case:
    """A copy of it."""
    shutil.copytree(fitted.folder, tmp_path / "copy")
    moved = make_paths(fitted, tmp_path / "copy")
    return moved


def make_paths(case: Case, folder: Path) -> Case:
    files = {
        name: folder / Path(getattr(case.files, name)).name
        for name in ("queries", "query_ids", "qrels", "doc_ids")
    }
    return Case(
        folder=folder,
        index=folder / case.index.name,
        files=replace(case.files, **files),
        labels=case.labels,
    )


def read(case: Case) -> Judgments:
    return ss.read_judgments(case.files)


def state(case: Case) -> Path:
    return case.index.with_name(case.index.name + ".simskip")


def run(case: Case, refit: Refit = NEVER, judgments: Judgments | None = None) -> dict[str, Any]:
    store = ss.open_store(str(case.index))
    return run_night(store, judgments or read(case), GROWING, refit)


def add_rows(case: Case, count: int, seed: int = 5, shift: float = 0.0) -> np.ndarray:
    """Add rows that are like the first ones, but for a shift."""
    rng = np.random.default_rng(seed)
    journal = Journal(state(case), ss.open_store(str(case.index)).info())
    assert journal.manifest.current is not None
    first = journal.open_originals(journal.manifest.current).take(np.arange(ROWS))
    rows = first[rng.choice(ROWS, count, replace=False)] + 0.05 * rng.normal(size=(count, 16))
    rows += shift * np.eye(16)[0]
    rows = np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), np.float32)
    start = 20_000 + seed * 1000
    change(case.index, lambda index: index.add_with_ids(rows, np.arange(start, start + count)))
    return rows


def current(case: Case) -> Refiner:
    journal = Journal(state(case), ss.open_store(str(case.index)).info())
    assert journal.manifest.current is not None
    return Refiner.load(journal.refiners / journal.manifest.current.refiner)


def test_rows_that_stay_raw_need_no_new_file(case: Case) -> None:
    assert current(case).late in LateRule
    add_rows(case, 6)
    before = case.index.read_bytes()
    found = run(case)
    assert found["outcome"] == "written"
    assert found["rows"]["new"] == 6
    same = case.index.read_bytes() == before
    assert same == (current(case).late is LateRule.RAW)
    assert run(case)["outcome"] == "quiet"


def test_evidence_that_did_not_change_is_not_tried_again(case: Case) -> None:
    aged = Refit(new_judgments=1.0, max_age_days=-1, drift=False)
    looks = ss.status(ss.open_store(str(case.index)))["looks"]
    found = run(case, aged)
    assert found["refit"]["result"] == "kept"
    assert found["report"] is None  # the very same refiner: there is nothing to compare
    assert ss.status(ss.open_store(str(case.index)))["looks"] == looks


def permuted(judgments: Judgments, seed: int) -> Judgments:
    assert judgments.queries is not None
    qrels = judgments.queries.qrels
    assert qrels is not None
    docs = np.random.default_rng(seed).permutation(qrels.doc_ids).tolist()
    pairs = dict.fromkeys(zip(qrels.query_ids, docs, strict=True))
    shuffled = replace(
        qrels,
        query_ids=[query for query, _ in pairs],
        doc_ids=[doc for _, doc in pairs],
        grades=np.ones(len(pairs), np.int32),
    )
    return replace(judgments, queries=replace(judgments.queries, qrels=shuffled))


def test_judgments_by_lot_do_not_dethrone_the_current_refiner(case: Case) -> None:
    champion, before = current(case).id, case.index.read_bytes()
    found = run(case, Refit(drift=False), permuted(read(case), 0))
    assert found["refit"]["due"]
    assert found["outcome"] == "kept"
    assert found["report"]["gate"]["reasons"]
    assert current(case).id == champion
    assert case.index.read_bytes() == before
    # The same judgments again are no new evidence.
    assert run(case, Refit(drift=False), permuted(read(case), 0))["outcome"] == "quiet"


def test_a_challenger_that_loses_does_not_keep_new_rows_waiting(case: Case) -> None:
    add_rows(case, 6)
    found = run(case, Refit(drift=False), permuted(read(case), 1))
    assert found["outcome"] == "kept"
    assert found["rows"]["new"] == 6
    assert ss.status(ss.open_store(str(case.index)))["changed_since"] is False


def test_drifted_rows_ask_for_another_fit_and_like_ones_do_not(case: Case) -> None:
    refit = Refit(new_judgments=1.0, max_age_days=float("inf"))
    add_rows(case, 60, seed=1)
    store = ss.open_store(str(case.index))
    assert plan_night(store, read(case), GROWING, refit)["refit"]["due"] is False
    add_rows(case, 60, seed=2, shift=2.0)
    store = ss.open_store(str(case.index))
    planned = plan_night(store, read(case), GROWING, refit)
    assert planned["outcome"] == "planned"
    assert planned["drift"]["rows"]["alarm"]
    assert "rows have drifted" in planned["refit"]["reasons"][0]


def test_a_plan_changes_nothing(case: Case) -> None:
    add_rows(case, 5)
    before = {path: path.read_bytes() for path in case.folder.rglob("*") if path.is_file()}
    planned = plan_night(ss.open_store(str(case.index)), read(case), GROWING, Refit())
    assert planned["rows"]["new"] == 5
    after = {path: path.read_bytes() for path in case.folder.rglob("*") if path.is_file()}
    assert after == before


def test_the_challenger_is_compared_with_what_the_current_refiner_makes_of_all_rows(
    case: Case,
) -> None:
    add_rows(case, 40)
    champion = current(case)
    with open_workspace(ss.open_store(str(case.index)), read(case), GROWING, silent) as space:
        late = space.late(champion)
        assert np.array_equal(np.flatnonzero(late), np.flatnonzero(space.rows.ids >= 20_000))
        found = measure(space, champion, Split.TEST, current=champion)
    assert found is not None
    chosen = found[0].measures["nDCG@10"]
    assert chosen["delta"] == 0.0  # the same refiner on both sides
    assert found[0].detail is not None
    assert not found[0].detail["moved"]


def test_new_queries_are_looked_at_first_where_they_prove_more(case: Case, tmp_path: Path) -> None:
    champion = current(case)
    with open_workspace(ss.open_store(str(case.index)), read(case), GROWING, silent) as space:
        names = space.judged.queries[Split.TEST].ids
        fresh = set(names[: len(names) * 3 // 4])
        test = space.judged.queries[Split.TEST]
        old = test.subset(np.array([name not in fresh for name in names]))
        space.ledger = with_promising_looks(tmp_path / "old", old)
        found = measure(space, champion, Split.TEST, current=champion, freshest=True)
        assert found is not None
        assert {item["query"] for item in found[0].detail["queries"]} == fresh  # type: ignore[index]
        assert found[1].look.level == FIRST_LEVEL
        other = random_refiner(16, space.rows.ids)
        but_five = test.subset(np.arange(len(test)) > 4)
        space.ledger = with_promising_looks(tmp_path / "most", but_five)
        found = measure(space, other, Split.TEST, current=champion, freshest=True)
        assert found is not None
        assert len(found[0].detail["queries"]) == len(names)  # type: ignore[index]
        assert found[1].look.level < FIRST_LEVEL  # five new ones prove nothing by themselves


def with_promising_looks(folder: Path, queries: JudgedQueries) -> Ledger:
    """A ledger of looks that cost nothing, but for those at the same queries."""
    ledger = Ledger(folder)
    for number in range(6):
        taken = ledger.look({"refiner": str(number)}, queries)
        gains = 0.02 + np.random.default_rng(0).normal(0, 0.2, len(queries))
        ledger.saw(taken, compare(np.zeros(len(queries)), gains - gains.mean() + 0.02, 0.05, 0))
    return ledger


def with_queries_that_lose(case: Case, count: int) -> Judgments:
    """Judgments with fresh queries to which just what the originals' search finds is relevant."""
    journal = Journal(state(case), ss.open_store(str(case.index)).info())
    assert journal.manifest.current is not None
    originals = journal.open_originals(journal.manifest.current)
    rows = np.concatenate([block for _, block in originals.blocks()])
    rng, known = np.random.default_rng(count), read(case)
    vectors = rows[rng.choice(len(rows), count)] + 0.3 * rng.normal(size=(count, 16))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    best = np.argsort(-vectors @ rows.T, axis=1)[:, :5]
    assert known.queries is not None
    qrels = known.queries.qrels
    assert qrels is not None
    names = [f"new {count} {i}" for i in range(count)]
    more = replace(
        qrels,
        query_ids=[*qrels.query_ids, *np.repeat(names, 5).tolist()],
        doc_ids=[*qrels.doc_ids, *(f"doc-{row}" for row in best.ravel())],
        grades=np.concatenate([qrels.grades, np.ones(best.size, np.int32)]),
    )
    return replace(
        known,
        queries=replace(
            known.queries,
            ids=(*known.queries.ids, *names),
            vectors=np.concatenate([known.queries.vectors, vectors]),
            qrels=more,
        ),
    )


NO_REFIT = Refit(new_judgments=float("inf"), max_age_days=float("inf"), drift=False)


def test_queries_that_come_after_a_write_watch_it(case: Case) -> None:
    assert run(case)["live"] is None  # a quiet night
    found = run(case, NO_REFIT, with_queries_that_lose(case, 40))
    live = found["live"]
    assert live["refiner"] == current(case).id
    assert 0 < live["queries"] < 40  # the test queries of those that came
    assert live["gain"] < 0
    assert ss.status(ss.open_store(str(case.index)))["live"] == live
    more = with_queries_that_lose(case, 40)
    add_rows(case, 3)  # no quiet night
    assert run(case, NO_REFIT, more)["live"] == live  # none of them is fresh any more


def test_harm_that_fresh_queries_prove_is_told_until_it_is_rolled_back(case: Case) -> None:
    looks, champion = ss.status(ss.open_store(str(case.index)))["looks"], current(case)
    judgments = with_queries_that_lose(case, 1500)
    for _ in range(2):
        found = run(case, NO_REFIT, judgments)
        assert found["live"]["harmful"]
        assert found["live"]["p"] <= 0.05
        assert current(case).id == champion.id  # nobody asked to roll it back
    store = ss.open_store(str(case.index))
    assert ss.status(store)["looks"] == looks  # watching is no look
    found = run_night(store, judgments, GROWING, NO_REFIT, roll_back_harm=True)
    assert (found["action"], found["outcome"]) == ("rollback", "restored")
    assert champion.id in found["notes"][0]
    assert ss.status(ss.open_store(str(case.index)))["refined"] is None
    # The very same refiner is never written again, whatever earlier looks said.
    folder = case.folder / "again"
    champion.save(folder)
    report = ss.refine(ss.open_store(str(case.index)), read(case), Settings(refiner=folder))
    assert report.gate is not None
    assert not report.gate.passed
    assert "does harm" in report.gate.reasons[0]


def test_a_row_that_changed_loses_the_offset_that_was_learnt_for_what_it_held(case: Case) -> None:
    champion = current(case)
    assert len(champion.offset_ids)
    row = int(champion.offset_ids[0])
    other = -np.eye(16, dtype=np.float32)[:1]

    def move(index: faiss.Index) -> None:
        index.remove_ids(np.array([row]))
        index.add_with_ids(other, np.array([row]))

    change(case.index, move)
    found = run(case)
    assert (found["rows"]["new"], found["rows"]["changed"]) == (0, 1)
    now = ss.open_store(str(case.index)).fetch(np.array([row]))
    late = champion.refine_rows(other, np.array([row]), np.ones(1, np.bool_))
    assert near(now, late)
    assert not near(now, champion.refine_rows(other, np.array([row])))


def test_overlapping_nights_step_aside(case: Case) -> None:
    add_rows(case, 3)
    with (
        Journal(state(case), ss.open_store(str(case.index)).info()),
        pytest.raises(StateInUseError),
    ):
        run(case)


@pytest.mark.parametrize("name", ["attempt.json", "runs/000001.json"])
@pytest.mark.parametrize("damage", ["", "{", "[]", '{"schema": 99}', '{"schema": 1, "judged": 3}'])
def test_damaged_memory_is_named_and_not_used(case: Case, name: str, damage: str) -> None:
    path = state(case) / name
    path.write_text(damage)
    if name == "attempt.json":
        with pytest.raises(JournalError, match=r"attempt\.json"):
            run(case)
    elif damage != '{"schema": 1, "judged": 3}':
        with pytest.raises(JournalError, match="000001"):
            Runs(state(case)).read()


def test_a_damaged_list_of_known_rows_is_named_and_not_used(
    case: Case, rng: np.random.Generator
) -> None:
    refiner = current(case).id
    path = state(case) / "refiners" / refiner / "known.arrow"
    journal = Journal(state(case), ss.open_store(str(case.index)).info())
    whole, told = path.read_bytes(), 0
    known = journal.known(refiner)
    assert known is not None
    damaged = [whole[: len(whole) // 2], b""]
    for at in rng.integers(0, len(whole), 60).tolist():
        damaged.append(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
    for data in damaged:
        path.write_bytes(data)
        try:
            found = journal.known(refiner)
        except JournalError as error:
            told += "known.arrow" in str(error)
        else:  # a byte that pads the format and means nothing
            assert found is not None
            assert np.array_equal(found.ids, known.ids)
            assert np.array_equal(found.digests, known.digests)
    assert told > 30


def test_retention_bounds_the_state_and_keeps_what_is_needed(case: Case) -> None:
    for seed in range(4):
        add_rows(case, 2, seed=seed)
        run(case)
    store = ss.open_store(str(case.index))
    done = ss.prune(store, runs=2, refiners=0)
    assert len(Runs(state(case)).read()) == 2
    assert {name.split("/")[0] for name in done["removed"]} == {"runs"}
    history = ss.status(store)["history"]
    assert len(history) <= 3
    assert {entry["refiner"] for entry in history} == {current(case).id}
    assert run(case)["outcome"] == "quiet"
    numbers = sorted(path.stem for path in (state(case) / "runs").iterdir())
    assert numbers[-1] == "000006"  # numbers go on where they were


def test_the_record_of_a_night_is_plain_json(case: Case) -> None:
    add_rows(case, 3)
    found = run(case)
    assert Runs(state(case)).read()[-1] == json.loads(json.dumps(found, allow_nan=False))
