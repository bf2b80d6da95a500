"""Several FAISS files as one index: refined together, undone together, whatever happens between."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from builders import change, flat, ivf, random_refiner
from faiss_files import put_lists_on_disk
from judged import ROWS, Case, make_case
from live import Killed

import simskip_vdb as ss
from simskip_vdb.config import FitSettings
from simskip_vdb.connectors import open_store
from simskip_vdb.connectors.faiss_parts import FaissParts
from simskip_vdb.connectors.faiss_store import FaissStore
from simskip_vdb.datatypes import Ids, Split, VectorBatch, Vectors, silent
from simskip_vdb.durable import sha256_of
from simskip_vdb.errors import (
    ConfigError,
    DataError,
    JournalError,
    StoreChangedError,
    StoreError,
    StoreNotFoundError,
    UnsupportedIndexError,
)
from simskip_vdb.report import Report

N, D = 90, 8
EDGES = (0, 20, 55, N)


def rows_of(index: Path | str) -> dict[int, bytes]:
    """Return every row of an index by id, to the bit."""
    return {
        int(i): row.tobytes()
        for batch in open_store(str(index), read_only=True).scan(50)
        for i, row in zip(batch.ids, batch.vectors, strict=True)
    }


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


def pattern(folder: Path) -> str:
    return f"faiss:{folder}/part*.faiss"


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


class Desk:
    """Three parts, worked on by hand."""

    def __init__(self, folder: Path, kind: str) -> None:
        rng = np.random.default_rng(3)
        self.folder, self.kind = folder, kind
        self.uri = pattern(folder)
        self.vectors: Vectors = rng.normal(size=(N, D)).astype(np.float32)
        ids = np.sort(rng.choice(10_000, N, replace=False))
        self.ids: Ids = ids if kind == "ivf" else np.arange(N)
        self.paths = [folder / f"part{part}.faiss" for part in range(3)]
        for path, (start, stop) in zip(self.paths, pairwise(EDGES), strict=True):
            if kind == "ivf":
                ivf(path, self.ids[start:stop], self.vectors[start:stop])
            else:
                flat(path, self.vectors[start:stop])
        self.originals = self.rows()
        for seed in range(2):
            random_refiner(D, self.ids, seed).save(folder / f"refiner{seed}")

    def rows(self) -> dict[int, bytes]:
        return rows_of(self.uri)

    def refine(self, which: int = 0) -> Report:
        settings = ss.Settings(refiner=self.folder / f"refiner{which}", accept_unmeasured=True)
        return ss.refine(open_store(self.uri), ss.Judgments(), settings)

    def rollback(self) -> dict[str, Any]:
        return ss.rollback(open_store(self.uri))

    def expected(self, which: int = 0) -> dict[int, bytes]:
        refiner = ss.Refiner.load(self.folder / f"refiner{which}")
        refined = refiner.refine_rows(self.vectors, self.ids)
        return {int(i): row.tobytes() for i, row in zip(self.ids, refined, strict=True)}


@pytest.fixture(params=["ivf", "flat"])
def desk(request: pytest.FixtureRequest, tmp_path: Path) -> Desk:
    return Desk(tmp_path, request.param)


@contextmanager
def dying(at: int, error: BaseException) -> Iterator[None]:
    """Fail as the part of that number, from 0, is to be written."""
    write, calls = FaissStore.replace_keeping, count()

    def replace_keeping(self: FaissStore, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        if next(calls) == at:
            raise error
        write(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FaissStore, "replace_keeping", replace_keeping)
        yield


def close(rows: dict[int, bytes], expected: dict[int, bytes]) -> bool:
    """Tell whether rows are equal but for what the size of a block does to the last digits."""
    return rows.keys() == expected.keys() and all(
        np.allclose(np.frombuffer(row, "f4"), np.frombuffer(expected[i], "f4"), atol=1e-6)
        for i, row in rows.items()
    )


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
    write = FaissStore.replace_keeping

    def replace_keeping(self: FaissStore, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        write(self, *args, **kwargs)
        if self.path == desk.paths[0]:
            ids = np.array([20_000])
            add = (lambda i: i.add_with_ids(newer, ids)) if desk.kind == "ivf" else None
            change(desk.paths[1], add or (lambda i: i.add(newer)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FaissStore, "replace_keeping", replace_keeping)
        with pytest.raises(StoreChangedError, match=r"part1\.faiss"):
            desk.refine()
    assert ss.status(open_store(desk.uri))["interrupted"]
    rows = list(rows_of(desk.paths[1].with_name("part[1].faiss")).values())
    assert rows[-1] == newer.tobytes()  # untouched, and with the application's row
    desk.refine()
    assert not set(desk.rows().values()) & {newer.tobytes(), *desk.originals.values()}
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
    desk.refine(1)  # another one than was interrupted
    desk.rollback()
    assert list(desk.rows().values()) == [row.tobytes() for row in desk.vectors[1:]]


# The store.


def test_ids_that_count_each_part_from_zero_go_on(tmp_path: Path) -> None:
    desk = Desk(tmp_path, "flat")
    store = FaissParts(tmp_path / "part*.faiss")
    assert store.info().positional
    np.testing.assert_array_equal(store.fetch(np.array([60, 3, 20])), desk.vectors[[60, 3, 20]])
    shards = faiss.IndexShards(D, False, True)
    parts = [faiss.read_index(str(path)) for path in desk.paths]
    for part in parts:
        shards.add_shard(part)
    found = store.search(desk.vectors[:30], 7, {})
    scores, ids = shards.search(desk.vectors[:30], 7)
    np.testing.assert_array_equal(found.ids, ids)
    np.testing.assert_allclose(found.scores, scores, rtol=1e-6)


def test_lists_in_files_of_their_own(tmp_path: Path) -> None:
    desk = Desk(tmp_path, "ivf")
    for part, path in enumerate(desk.paths[:2]):
        put_lists_on_disk(faiss.read_index(str(path)), path, f"lists{part}")
    lists = [sha256_of(tmp_path / f"lists{part}") for part in range(2)]
    desk.refine()
    assert close(desk.rows(), desk.expected())
    assert desk.rollback()["exact"]
    assert desk.rows() == desk.originals
    assert [sha256_of(tmp_path / f"lists{part}") for part in range(2)] == lists


def test_what_it_says_of_itself(tmp_path: Path) -> None:
    Desk(tmp_path, "ivf")
    info = open_store(str(tmp_path / "part*.faiss")).info()
    assert info.kind == "3 parts of IVF4 Flat, custom ids"
    assert info.uri == f"faiss:{tmp_path}/part*.faiss"
    assert info.state == tmp_path / "part_.faiss.simskip"
    assert info.details["nlist"] == 4
    flat(tmp_path / "part3.faiss", np.empty((0, D), np.float32))
    info = open_store(str(tmp_path / "part*.faiss")).info()
    assert info.kind == "4 parts of IVF4 Flat, custom ids, Flat"
    assert "nlist" not in info.details
    assert open_store(str(tmp_path / "part[01].faiss")).info().count == EDGES[2]


def test_ids_that_come_twice_are_refused(tmp_path: Path) -> None:
    desk = Desk(tmp_path, "ivf")
    ivf(tmp_path / "part9.faiss", desk.ids[4:8], desk.vectors[:4], nlist=1)
    with pytest.raises(DataError, match=rf"4 ids \(such as {desk.ids[4]}\)"):
        open_store(desk.uri)


def test_parts_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    desk = Desk(tmp_path, "flat")
    faiss.write_index(faiss.IndexFlatL2(D), str(tmp_path / "part9.faiss"))
    with pytest.raises(DataError, match=r"part9\.faiss has 8 and euclid"):
        open_store(desk.uri)
    flat(tmp_path / "part9.faiss", np.zeros((1, D + 1), np.float32))
    with pytest.raises(DataError, match=r"part9\.faiss has 9 and dot"):
        open_store(desk.uri)
    (tmp_path / "part9.faiss").unlink()
    (tmp_path / "part9.faiss").symlink_to("part0.faiss")
    with pytest.raises(DataError, match="same file"):
        open_store(desk.uri)


@pytest.mark.parametrize(("factory", "way_out"), [("PQ2x4", "--originals"), ("SQ8", "--refiner")])
def test_rows_that_are_not_read_exactly_are_refused(
    tmp_path: Path, factory: str, way_out: str
) -> None:
    desk = Desk(tmp_path, "flat")
    index = faiss.index_factory(D, factory, faiss.METRIC_INNER_PRODUCT)
    index.train(np.random.default_rng(0).normal(size=(1000, D)).astype("f4"))
    faiss.write_index(index, str(tmp_path / "part9.faiss"))
    with pytest.raises(UnsupportedIndexError, match=way_out):
        open_store(desk.uri)


def test_names_that_lead_nowhere_and_names_with_brackets(tmp_path: Path) -> None:
    with pytest.raises(StoreNotFoundError, match="no such file"):
        open_store(str(tmp_path / "part*.faiss"))
    path = flat(tmp_path / "odd[1].faiss", np.eye(D, dtype="f4"))
    assert isinstance(open_store(str(path)), FaissStore)
    folder = tmp_path / "odd[2]"
    folder.mkdir()
    flat(folder / "part0.faiss", np.eye(D, dtype="f4"))
    assert open_store(f"{folder}/part*.faiss").info().kind == "1 part of Flat"


def test_read_only_refuses_to_write(desk: Desk) -> None:
    store = FaissParts.open(desk.uri, read_only=True)
    batch = VectorBatch(ids=desk.ids[:1], vectors=desk.vectors[:1])
    for write in (
        lambda: store.update(batch, lambda now: np.ones(1, np.bool_)),
        lambda: store.settle(silent),
        lambda: store.mark(None),
    ):
        with pytest.raises(ConfigError, match="reading only"):
            write()


def test_a_part_is_not_refined_twice(desk: Desk) -> None:
    desk.refine()
    with pytest.raises(ConfigError, match=r"as a part of faiss:.*part\*\.faiss"):
        open_store(str(desk.paths[1]))
    settings = ss.Settings(refiner=desk.folder / "refiner1", accept_unmeasured=True)
    with pytest.raises(JournalError, match="marked as refined"):
        ss.refine(open_store(f"{desk.folder}/part?.fai*"), ss.Judgments(), settings)
    desk.rollback()
    assert open_store(str(desk.paths[1])).info().count == EDGES[2] - EDGES[1]
    ss.refine(open_store(str(desk.paths[1])), ss.Judgments(), settings)
    with pytest.raises(ConfigError, match=r"part1\.faiss was refined by itself"):
        open_store(desk.uri)
    ss.rollback(open_store(str(desk.paths[1])))
    assert desk.rows() == desk.originals


def test_a_state_elsewhere_is_that_of_the_parts(desk: Desk, tmp_path: Path) -> None:
    state = tmp_path / "state"
    settings = ss.Settings(refiner=desk.folder / "refiner0", accept_unmeasured=True, state=state)
    ss.refine(open_store(desk.uri), ss.Judgments(), settings)
    other = flat(tmp_path / "other.faiss", desk.vectors)
    with pytest.raises(JournalError, match="is the state of"):
        ss.refine(open_store(str(other)), ss.Judgments(), settings)
    assert desk.rollback()["exact"]
    assert desk.rows() == desk.originals
