"""A clock that jumps decides nothing: neither what was written, nor whose it is."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

import faiss
import numpy as np
import pytest
from live import Killed
from small_index import Index

from simskip_vdb.errors import ConfigError, NothingWrittenError, StoreChangedError

YEARS = 5 * 365 * 86400.0


@pytest.fixture
def jumping(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every look at the clock find another year."""
    rng = np.random.default_rng(0)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + rng.uniform(-YEARS, YEARS))


@pytest.mark.usefixtures("jumping")
@pytest.mark.parametrize("kind", ["faiss", "edge", "local"])
def test_runs_that_die_go_on_and_back_whatever_the_clock_says(kind: str, tmp_path: Path) -> None:
    index = Index(kind, tmp_path)
    for stage in ("read", "write", "verify"):
        index.renew()

        def die(now: str, done: int, total: int, at: str = stage) -> None:
            if now == at:
                raise Killed

        with pytest.raises(Killed):
            index.refine(die)
        assert (index.is_old() | index.is_new()).all()
        index.refine()
        assert index.is_new().all()
        index.refine()
        assert index.is_new().all()
        index.rollback()
        assert index.is_old().all()


@pytest.mark.parametrize("kind", ["faiss", "faiss flat"])
@pytest.mark.parametrize("in_place", [True, False])
def test_a_save_within_the_same_instant_is_noticed(
    kind: str, in_place: bool, tmp_path: Path
) -> None:
    index = Index(kind, tmp_path)
    path = index.now / "x.faiss"
    newer = -index.old

    def application(stage: str, done: int, total: int) -> None:
        if stage != "read":
            return
        then = path.stat()
        held = faiss.read_index(str(path))
        held.reset()
        if kind == "faiss":
            held.add_with_ids(newer, index.kind.ids)
        else:
            held.add(newer)
        if not in_place:
            path.unlink()
        faiss.write_index(held, str(path))
        os.utime(path, ns=(then.st_atime_ns, then.st_mtime_ns))  # its clock stood still

    with pytest.raises(StoreChangedError):
        index.refine(application)
    np.testing.assert_array_equal(index.rows(), newer)
    with suppress(StoreChangedError, NothingWrittenError):  # all rows came after the refiner's
        index.refine()
    with suppress(ConfigError):  # nothing is left of the run that gave up
        index.rollback()
    np.testing.assert_array_equal(index.rows(), newer)
