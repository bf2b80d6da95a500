"""Lossy codes are refined from the exact vectors behind them, never from what they decode to."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from builders import flat, random_refiner
from click.testing import CliRunner

from simskip_vdb.cli import cli
from simskip_vdb.connectors import open_store
from simskip_vdb.datatypes import Vectors
from simskip_vdb.errors import ConfigError, DataError, JournalError, UnsupportedIndexError
from simskip_vdb.judgments import Judgments
from simskip_vdb.pipeline import Settings, refine
from simskip_vdb.refiner import Refiner
from simskip_vdb.upkeep import rollback

COUNT, DIM = 600, 16
Make = Callable[..., Path]


@pytest.fixture
def vectors(rng: np.random.Generator) -> Vectors:
    return rng.standard_normal((COUNT, DIM)).astype(np.float32)


@pytest.fixture
def make(tmp_path: Path, vectors: Vectors) -> Make:
    """Write a PQ, which loses about half of every vector, and its originals beside it."""

    def make(factory: str = "PQ8x4", ids: Any = None) -> Path:  # noqa: ANN401
        index = faiss.index_factory(DIM, factory, faiss.METRIC_INNER_PRODUCT)
        index.train(vectors)
        if ids is None:
            index.add(vectors)
        else:
            index.add_with_ids(vectors, ids)
        faiss.write_index(index, str(tmp_path / "codes.faiss"))
        np.save(tmp_path / "exact.npy", vectors.astype(np.float64))
        return tmp_path / "codes.faiss"

    return make


def settings(folder: Path) -> Settings:
    random_refiner(DIM, np.arange(0)).save(folder / "refiner")
    return Settings(
        refiner=folder / "refiner", accept_unmeasured=True, search_params={}, state=folder / "state"
    )


def refined(path: Path, **given: Any) -> Any:  # noqa: ANN401
    store = open_store(str(path), **given)
    report = refine(store, Judgments(), settings(path.parent))
    assert report.written is not None
    return report


def holds(path: Path, expected: Vectors) -> float:
    """Return how many rows of the codes are nearest to their own expected vector."""
    index = faiss.read_index(str(path))
    decoded = index.reconstruct_n(0, index.ntotal)
    distances = ((decoded[:, None] - expected[None]) ** 2).sum(-1)
    return float((distances.argmin(1) == np.arange(len(expected))).mean())


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(autouse=True)
def _no_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the codes of random vectors, which find little, through the last check."""
    monkeypatch.setattr("simskip_vdb.gate.ANN_FALL", 1.0)


def expected(path: Path, vectors: Vectors) -> Vectors:
    refiner = Refiner.load(path.parent / "refiner")
    return refiner.refine_rows(vectors, np.arange(len(vectors)))


def test_codes_are_made_from_the_refined_originals(make: Make, vectors: Vectors) -> None:
    path = make()
    before = sha(path)
    refined(path, originals=path.parent / "exact.npy")
    wanted = expected(path, vectors)
    assert holds(path, wanted) > 0.9
    assert rollback(open_store(str(path)), state=path.parent / "state")["exact"]
    assert sha(path) == before


def test_a_second_run_needs_no_originals_and_starts_from_them(make: Make, vectors: Vectors) -> None:
    path = make()
    refined(path, originals=str(path.parent / "exact.npy"))
    random_refiner(DIM, np.arange(0), seed=5).save(path.parent / "refiner")
    again = Refiner.load(path.parent / "refiner")
    report = refine(
        open_store(str(path)),
        Judgments(),
        Settings(
            refiner=path.parent / "refiner", accept_unmeasured=True, state=path.parent / "state"
        ),
    )
    assert report.written is not None
    assert report.written["rows"] == COUNT
    assert holds(path, again.refine_rows(vectors, np.arange(COUNT))) > 0.9


def test_another_index_gives_the_originals_by_id(
    make: Make, tmp_path: Path, vectors: Vectors
) -> None:
    path = make()
    refined(path, originals=f"faiss:{flat(tmp_path / 'flat.faiss', vectors)}")
    assert holds(path, expected(path, vectors)) > 0.9


def test_ids_name_the_originals(make: Make, vectors: Vectors, rng: np.random.Generator) -> None:
    ids = rng.permutation(COUNT) * 5
    path = make("IVF2,PQ8x4", ids)
    exact, names = path.parent / "exact.npy", path.parent / "ids.txt"
    with pytest.raises(ConfigError, match="--originals-ids"):
        open_store(str(path), originals=exact)
    names.write_text("".join(f"{i}\n" for i in ids))
    refined(path, originals=exact, originals_ids=names)
    index = faiss.read_index(str(path))
    index.set_direct_map_type(faiss.DirectMap.Hashtable)
    decoded = np.stack([index.reconstruct(int(i)) for i in ids])
    refiner = Refiner.load(path.parent / "refiner")
    near = np.linalg.norm(decoded - refiner.refine_rows(vectors, ids), axis=1)
    assert np.median(near / np.linalg.norm(vectors, axis=1)) < 0.5


def test_originals_of_other_rows_are_noticed(make: Make, vectors: Vectors) -> None:
    path = make()
    before = sha(path)
    np.save(path.parent / "exact.npy", vectors[::-1])
    with pytest.raises(DataError, match="do not resemble"):
        refined(path, originals=path.parent / "exact.npy")
    assert sha(path) == before


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (np.zeros((COUNT - 1, DIM)), DataError, "599 vectors for 600 rows"),
        (np.zeros((COUNT, DIM + 1)), ConfigError, "17 dimensions"),
        (np.zeros(COUNT), DataError, "one vector"),
        (np.zeros((COUNT, DIM), np.int64), DataError, "int64"),
        (np.array([{}]), DataError, "--originals takes"),
    ],
)
def test_originals_that_do_not_fit_are_refused(
    make: Make,
    content: Any,  # noqa: ANN401
    error: type[Exception],
    message: str,
) -> None:
    path = make()
    np.save(path.parent / "exact.npy", content, allow_pickle=True)
    with pytest.raises(error, match=message):
        refined(path, originals=path.parent / "exact.npy")


def test_an_index_that_holds_its_vectors_takes_no_originals(
    tmp_path: Path, vectors: Vectors
) -> None:
    path = flat(tmp_path / "flat.faiss", vectors)
    np.save(tmp_path / "exact.npy", vectors)
    with pytest.raises(ConfigError, match="leave --originals out"):
        open_store(str(path), originals=tmp_path / "exact.npy")
    with pytest.raises(ConfigError, match="belongs to --originals"):
        open_store(str(path), originals_ids=tmp_path / "exact.npy")


def test_rows_added_since_are_rolled_back_only_with_their_originals(
    make: Make, vectors: Vectors, rng: np.random.Generator
) -> None:
    path = make()
    refined(path, originals=path.parent / "exact.npy")
    index = faiss.read_index(str(path))
    late = rng.standard_normal((3, DIM)).astype(np.float32)
    index.add(late)
    faiss.write_index(index, str(path))
    with pytest.raises((UnsupportedIndexError, JournalError), match=r"--originals|cannot be told"):
        rollback(open_store(str(path)), state=path.parent / "state")
    np.save(path.parent / "exact.npy", np.concatenate([vectors, late]))
    store = open_store(str(path), originals=path.parent / "exact.npy")
    done = rollback(store, state=path.parent / "state")
    assert (done["exact"], done["restored"], done["kept"]) == (False, COUNT, 3)
    assert holds(path, np.concatenate([vectors, late])) > 0.9


def test_the_command_line_takes_originals(make: Make) -> None:
    path = make()
    settings(path.parent)
    command = ["refine", str(path), "--refiner", str(path.parent / "refiner"), "--json"]
    command += ["--accept-unmeasured"]
    bare = CliRunner().invoke(cli, command)
    assert isinstance(bare.exception, UnsupportedIndexError)
    given = CliRunner().invoke(cli, [*command, "--originals", str(path.parent / "exact.npy")])
    assert given.exit_code == 0
    seen = CliRunner().invoke(cli, ["inspect", str(path)])
    assert "--originals FILE.npy" in seen.output
    assert CliRunner().invoke(cli, ["rollback", str(path)]).exit_code == 0
