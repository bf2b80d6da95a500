"""An application saves its FAISS file while it is refined: every one of its writes survives."""

from __future__ import annotations

import os
from pathlib import Path

import faiss
import numpy as np
import pytest
from small_index import Index

from simskip_vdb.connectors import faiss_store, swap
from simskip_vdb.datatypes import Vectors
from simskip_vdb.errors import StoreChangedError

SAVES, A_SAVE = 12, 6


class Application:
    """Inserts, updates and deletes rows of an IVF, and saves it.

    Attributes:
        rows: The vector of every row that should be there, as it was written last.
        own: Ids of those that it wrote itself.
        writes: Rows inserted, updated and deleted so far.
    """

    def __init__(self, index: Index, *, in_place: bool) -> None:
        self._path, self._in_place = index.now / "x.faiss", in_place
        self._rng = np.random.default_rng(0)
        self.rows: dict[int, Vectors] = dict(zip(index.kind.ids.tolist(), index.old, strict=True))
        self.own: set[int] = set()
        self.writes = self._next = 0
        self.saved = b""

    def save(self) -> None:
        """Load the index, write some rows, and save it, in place or by renaming."""
        held = faiss.read_index(str(self._path))
        for _ in range(A_SAVE):
            self._write(held)
        target = self._path if self._in_place else self._path.with_name("saving")
        faiss.write_index(held, str(target))
        os.replace(target, self._path)
        self.saved = self._path.read_bytes()

    def _write(self, held: faiss.Index) -> None:
        action = ("insert", "update", "delete")[int(self._rng.integers(3))]
        name = int(self._rng.choice(list(self.rows)))
        if action == "insert":
            self._next += 1
            name = 10**6 + self._next
        else:
            assert held.remove_ids(np.array([name])) == 1
            del self.rows[name]
            self.own.discard(name)
        if action != "delete":
            row = self._rng.standard_normal((1, 8)).astype(np.float32)
            held.add_with_ids(row, np.array([name]))
            self.rows[name] = row[0]
            self.own.add(name)
        self.writes += 1


def held_by(index: Index) -> dict[int, Vectors]:
    """Read all rows by bare FAISS."""
    found = index.kind.read(index.now)
    return dict(zip(found.ids.tolist(), found.vectors, strict=True))


def same(found: dict[int, Vectors], expected: dict[int, Vectors]) -> bool:
    return found.keys() == expected.keys() and all(
        np.array_equal(found[name], expected[name]) for name in expected
    )


@pytest.mark.parametrize("in_place", [True, False])
def test_no_save_of_an_application_is_lost(in_place: bool, tmp_path: Path) -> None:
    index = Index("faiss", tmp_path)
    application = Application(index, in_place=in_place)
    path, rng = index.now / "x.faiss", np.random.default_rng(1)
    noticed = 0
    for _ in range(SAVES):
        stage = ("read", "write", "verify")[int(rng.integers(3))]
        armed = [stage]

        def meanwhile(now: str, done: int, total: int) -> None:
            if armed and now == armed[0]:  # noqa: B023
                armed.clear()  # noqa: B023
                application.save()

        with pytest.raises(StoreChangedError):
            index.refine(meanwhile)
        assert not armed
        noticed += 1
        assert path.read_bytes() == application.saved
        assert same(held_by(index), application.rows)
    assert (noticed, application.writes) == (SAVES, SAVES * A_SAVE)
    index.refine()
    refined = held_by(index)
    assert refined.keys() == application.rows.keys()
    assert not same(refined, application.rows)
    index.rollback()
    assert path.read_bytes() == application.saved


def test_what_is_saved_over_a_refined_file_survives_the_way_back(tmp_path: Path) -> None:
    index = Index("faiss", tmp_path)
    application = Application(index, in_place=True)
    index.refine()
    for _ in range(SAVES):
        application.save()
    assert len(application.own) > SAVES
    index.rollback()
    assert same(held_by(index), application.rows)


def test_a_save_right_before_the_swap_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = Index("faiss", tmp_path)
    application = Application(index, in_place=False)
    real = swap.keep_as

    def keep_as(*arguments: object) -> None:
        application.save()  # after its bytes were compared
        real(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(faiss_store, "keep_as", keep_as)
        with pytest.raises(StoreChangedError):
            index.refine()
    assert same(held_by(index), application.rows)
    index.refine()
    index.rollback()
    assert same(held_by(index), application.rows)
