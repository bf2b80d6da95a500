"""Several FAISS files as one index: refined together, undone together, whatever happens between."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import change, ivf, random_refiner
from faiss_parts import EDGES, D, Desk, N, close, pattern, rows_of
from judged import ROWS, Case, make_case
from live import Killed

import simskip_vdb as ss
from simskip_vdb.config import FitSettings
from simskip_vdb.connectors import open_store
from simskip_vdb.connectors.faiss_store import FaissStore
from simskip_vdb.datatypes import Split
from simskip_vdb.durable import sha256_of
from simskip_vdb.errors import (
    ConfigError,
    NothingWrittenError,
    StoreChangedError,
    StoreError,
)
from simskip_vdb.report import Report
from simskip_vdb.store import Candidate, VectorStore
from simskip_vdb.through_index import ThroughIndex

# The whole job, judged.


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A judged index that is also there as three parts, ids of which are mixed."""
    case = make_case(tmp_path_factory.mktemp("judged"))
    batch = next(iter(open_store(str(case.index)).scan(ROWS)))
    for part in range(3):
        path = case.folder / f"part{part}.faiss"
        ivf(path, batch.ids[part::3], np.ascontiguousarray(batch.vectors[part::3]))
    return case


def refine_judged(case: Case, seed: int = 0) -> Report:
    settings = ss.Settings(fit=FitSettings(seed=seed))
    return ss.refine(open_store(pattern(case.folder)), ss.read_judgments(case.files), settings)


@pytest.fixture(scope="module")
def refined(
    case: Case, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Case, Report, dict[int, bytes]]:
    copy = make_case(tmp_path_factory.mktemp("refined"))
    for part in case.folder.glob("part?.faiss"):
        shutil.copy(part, copy.folder)
    before = rows_of(pattern(copy.folder))
    return copy, refine_judged(copy), before


def test_parts_are_measured_as_the_merged_index_is(case: Case) -> None:
    found = []
    for uri in (str(case.index), pattern(case.folder)):
        random_refiner(16, np.arange(10_000)).save(case.folder / "refiner")
        settings = ss.Settings(refiner=case.folder / "refiner")
        judgments = ss.read_judgments(case.files)
        found.append(ss.evaluate(open_store(uri), judgments, settings, on=Split.VALIDATION))
    merged, parts = found
    assert parts.rows == ROWS
    for name, values in merged.measures.items():
        assert parts.measures[name]["before"] == values["before"]
        assert parts.measures[name]["after"] == values["after"]
    # Every list is probed, so both indexes find what exact search finds.
    assert parts.through_index == merged.through_index


def test_a_gain_is_found_proven_written_and_undone(
    refined: tuple[Case, Report, dict[int, bytes]],
) -> None:
    case, report, before = refined
    assert report.gate is not None
    assert report.gate.passed, report.gate.reasons
    assert report.written is not None
    assert (report.written["rows"], report.written["mode"]) == (ROWS, "in-place")
    assert report.refiner is not None
    refiner = ss.Refiner.load(report.refiner["path"])
    ids = np.array(list(before))
    raw = np.stack([np.frombuffer(row, np.float32) for row in before.values()])
    now = open_store(pattern(case.folder)).fetch(ids)
    np.testing.assert_allclose(now, refiner.refine_rows(raw, ids), atol=1e-6)
    again = refine_judged(case)
    assert "nothing to do" in again.notes[0]
    second = refine_judged(case, seed=1)  # from the originals, or refused and nothing written
    assert second.exit_code in (0, 3)
    status = ss.status(open_store(pattern(case.folder)))
    assert status["undo"] == f"simskip rollback '{pattern(case.folder)}'"
    done = ss.rollback(open_store(pattern(case.folder)))
    assert (done["exact"], done["restored"], done["kept"]) == (True, ROWS, 0)
    assert rows_of(pattern(case.folder)) == before
    assert ss.status(open_store(pattern(case.folder)))["refined"] is None


# By hand: three parts, refined by two refiners.


@pytest.fixture(params=["ivf", "flat"])
def desk(request: pytest.FixtureRequest, tmp_path: Path) -> Desk:
    return Desk(tmp_path, request.param)


@contextmanager
def dying(at: int, error: BaseException) -> Iterator[None]:
    """Fail as the part of that number, from 0, is to be written."""
    prepare, calls = FaissStore.prepared, count()

    def prepared(self: FaissStore, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        if next(calls) == at:
            raise error
        return prepare(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FaissStore, "prepared", prepared)
        yield


def test_a_second_refinement_starts_from_originals(desk: Desk) -> None:
    desk.refine(0)
    assert close(desk.rows(), desk.expected(0))
    desk.refine(1)
    assert close(desk.rows(), desk.expected(1))
    assert desk.rollback()["exact"]
    assert desk.rows() == desk.originals


@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("before", [0, 1])
def test_a_kill_between_parts_is_resumed_and_undone(desk: Desk, at: int, before: int) -> None:
    if before:
        desk.refine(1)
    with dying(at, Killed()), pytest.raises(Killed):
        desk.refine(0)
    assert len(desk.rows()) == N
    with dying(0, Killed()), pytest.raises(Killed):
        desk.refine(0)  # and once more
    report = desk.refine(0)
    assert "finished a write that was interrupted" in report.notes[-1]
    assert close(desk.rows(), desk.expected(0))
    assert desk.rollback()["exact"]
    assert desk.rows() == desk.originals


@pytest.mark.parametrize("at", [1, 2])
def test_a_kill_between_parts_is_rolled_back(desk: Desk, at: int) -> None:
    with dying(at, Killed()), pytest.raises(Killed):
        desk.refine(0)
    with dying(0, Killed()), pytest.raises(Killed):
        desk.rollback()
    assert desk.rollback()["exact"]
    assert desk.rows() == desk.originals
    with pytest.raises(ConfigError, match="nothing to roll back"):
        desk.rollback()


def test_a_written_index_that_is_refused_is_restored(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: ThroughIndex, candidate: VectorStore) -> None:
        assert close(desk.rows(), desk.expected(0))
        raise LookupError("refused")

    monkeypatch.setattr(ThroughIndex, "accept", refuse)
    with pytest.raises(LookupError):
        desk.refine(0)
    assert desk.rows() == desk.originals
    assert open_store(str(desk.paths[0])).info().count == EDGES[1]


@pytest.mark.parametrize("before", [0, 1])
def test_a_failure_between_parts_is_undone(desk: Desk, before: int) -> None:
    if before:
        desk.refine(1)
    held, last = desk.rows(), sha256_of(desk.paths[2])
    with dying(1, StoreError("disk is full")), pytest.raises(StoreError, match="disk is full"):
        desk.refine(0)
    assert desk.rows() == held
    assert sha256_of(desk.paths[2]) == last  # parts without new rows are not written
    assert not ss.status(open_store(desk.uri))["interrupted"]


def test_a_part_that_the_application_changes_meanwhile(desk: Desk) -> None:
    newer = np.full((1, D), 0.5, np.float32)
    prepare = FaissStore.prepared

    @contextmanager
    def prepared(self: FaissStore, *args: Any, **kwargs: Any) -> Iterator[Candidate]:  # noqa: ANN401
        with prepare(self, *args, **kwargs) as candidate:
            yield candidate
        if self.path == desk.paths[0]:
            ids = np.array([20_000])
            add = (lambda i: i.add_with_ids(newer, ids)) if desk.kind == "ivf" else None
            change(desk.paths[1], add or (lambda i: i.add(newer)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FaissStore, "prepared", prepared)
        with pytest.raises(StoreChangedError, match=r"part1\.faiss"):
            desk.refine()
    assert ss.status(open_store(desk.uri))["interrupted"]
    rows = list(rows_of(desk.paths[1].with_name("part[1].faiss")).values())
    assert rows[-1] == newer.tobytes()  # untouched, and with the application's row
    desk.refine()
    now = set(desk.rows().values())
    assert newer.tobytes() in now  # it came after the refiner's fit, and stays raw
    if desk.kind == "ivf":  # elsewhere ids shifted, and with them which rows the refiner knows
        assert not now & set(desk.originals.values())
    desk.rollback()
    # Every row has its original again, and the application's row is there.
    held = sorted(desk.rows().values())
    assert held == sorted([*desk.originals.values(), newer.tobytes()])


@pytest.mark.parametrize("then", ["rollback", "refine"])
def test_rows_that_shift_are_known_by_their_vectors(tmp_path: Path, then: str) -> None:
    desk = Desk(tmp_path, "flat")
    desk.refine(0)
    newer = np.full((1, D), 0.5, np.float32)
    change(desk.paths[0], lambda index: index.add(newer))
    change(desk.paths[1], lambda index: index.remove_ids(np.array([3])))
    if then == "refine":
        desk.refine(1)
    done = desk.rollback()
    rows = [row.tobytes() for row in desk.vectors]
    expected = [*rows[:20], newer.tobytes(), *rows[20:23], *rows[24:]]
    assert list(desk.rows().values()) == expected
    assert done["restored"] == (N if then == "refine" else N - 1)


def test_rows_that_shift_after_a_kill_are_known_too(tmp_path: Path) -> None:
    desk = Desk(tmp_path, "flat")
    desk.refine(1)
    with dying(2, Killed()), pytest.raises(Killed):
        desk.refine(0)
    change(desk.paths[0], lambda index: index.remove_ids(np.array([0])))
    # Another one than was interrupted; every id stands for another row now, all of them late.
    with pytest.raises(NothingWrittenError, match="after its fit"):
        desk.refine(1)
    desk.rollback()
    assert list(desk.rows().values()) == [row.tobytes() for row in desk.vectors[1:]]
