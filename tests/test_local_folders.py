"""Folders of Qdrant's local mode: opened without running their code, and left to older clients."""

from __future__ import annotations

import json
import pickle
import sqlite3
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import pytest
from builders import random_refiner
from qdrant_client import QdrantClient, models

import simskip_vdb as ss
from simskip_vdb import Settings
from simskip_vdb.connectors import open_store
from simskip_vdb.connectors.qdrant_pickles import refuse_code
from simskip_vdb.connectors.qdrant_store import QdrantStore
from simskip_vdb.datatypes import ID_TEXT, Vectors
from simskip_vdb.errors import ConfigError, StoreError, UnsupportedIndexError
from simskip_vdb.judgments import Judgments

N, D = 20, 6


@pytest.fixture
def folder(tmp_path: Path, rng: np.random.Generator) -> Path:
    rows: Vectors = rng.normal(size=(N, D)).astype(np.float32)
    client = QdrantClient(path=str(tmp_path / "db"))
    params = models.VectorParams(size=D, distance=models.Distance.DOT)
    client.create_collection(
        "c",
        vectors_config={"text": params},
        sparse_vectors_config={"words": models.SparseVectorParams()},
    )
    sparse = models.SparseVector(indices=[1, 4], values=[0.5, 1])
    points = [
        models.PointStruct(
            id=i,
            vector={"text": row, "words": sparse},
            payload={"at": datetime(2024, 1, 2, tzinfo=timezone.utc), "who": UUID(int=i), "n": [i]},
        )
        for i, row in enumerate(rows.tolist())
    ]
    client.upsert("c", points)
    client.close()
    ids = np.sort(np.array([str(i) for i in range(N)], ID_TEXT))
    random_refiner(D, ids).save(tmp_path / "refiner")
    return tmp_path / "db"


def opened(folder: Path) -> QdrantStore:
    store = open_store(f"qdrant-local:{folder}?collection=c")
    assert isinstance(store, QdrantStore)
    return store


def run(folder: Path, action: Callable[[QdrantStore], Any]) -> Any:  # noqa: ANN401
    store = opened(folder)
    try:
        return action(store)
    finally:
        store.close()


def refine(folder: Path, mode: str = "in-place") -> None:
    refiner = folder.parent / "refiner"
    asked = Settings(refiner=refiner, accept_unmeasured=True, mode=mode)
    run(folder, lambda store: ss.refine(store, Judgments(), asked))


def older(folder: Path) -> bytes:
    """Let it look as if a client had made it that does not know of every setting."""
    meta = json.loads((folder / "meta.json").read_bytes())
    del meta["collections"]["c"]["id_tracker"]
    (folder / "meta.json").write_text(json.dumps(meta))
    return (folder / "meta.json").read_bytes()


def test_what_the_client_wrote_of_collections_stays(folder: Path) -> None:
    before = older(folder)
    refine(folder)
    assert (folder / "meta.json").read_bytes() == before
    assert run(folder, lambda store: store.marker())["state"]
    run(folder, ss.rollback)
    assert (folder / "meta.json").read_bytes() == before
    assert run(folder, lambda store: store.marker()) is None
    assert sorted(file.name for file in (folder / "collection" / "c").iterdir()) == [
        "storage.sqlite"
    ]


def test_a_new_vector_in_an_older_folder_is_refused(folder: Path) -> None:
    before = older(folder)
    with pytest.raises(ConfigError, match="older qdrant-client"):
        refine(folder, "new-vector")
    assert (folder / "meta.json").read_bytes() == before
    client = QdrantClient(path=str(folder))
    client.update_collection("c", metadata={"owner": "me"})  # as its message advises
    client.close()
    refine(folder, "new-vector")


def test_a_note_of_an_earlier_version_is_read_and_taken_away(folder: Path) -> None:
    refine(folder)
    note = folder / "collection" / "c" / "simskip.json"
    client = QdrantClient(path=str(folder))
    client.update_collection("c", metadata={"simskip": json.loads(note.read_bytes()), "owner": 1})
    client.close()
    note.unlink()
    refine(folder)  # the state still is that of the note
    run(folder, ss.rollback)
    assert run(folder, lambda store: store.marker()) is None
    client = QdrantClient(path=str(folder))
    assert client.get_collection("c").config.metadata == {"owner": 1}
    client.close()


class _Runs:
    def __init__(self, what: Any, *arguments: Any) -> None:  # noqa: ANN401
        self._parts = what, arguments

    def __reduce__(self) -> Any:  # noqa: ANN401
        return self._parts


def put(folder: Path, point: bytes) -> None:
    storage = sqlite3.connect(folder / "collection" / "c" / "storage.sqlite")
    storage.execute("INSERT OR REPLACE INTO points VALUES ('gARLAC4=', ?)", (point,))
    storage.commit()
    storage.close()


@pytest.mark.parametrize("where", ["alone", "in a payload", "by a dotted name"])
def test_a_folder_runs_no_code(folder: Path, where: str, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    code = _Runs(open, str(ran), "w")
    if where == "in a payload":
        put(folder, pickle.dumps(models.PointStruct.model_construct(id=1, payload={"x": code})))
    elif where == "alone":
        put(folder, pickle.dumps(code))
    else:
        names = (b"qdrant_client.http.models.models", b"PointStruct.__init__.__globals__")
        texts = b"".join(b"\x8c" + bytes([len(name)]) + name for name in names)
        put(folder, b"\x80\x04" + texts + b"\x93.")
    with pytest.raises(UnsupportedIndexError, match="pickle that uses") as error:
        opened(folder)
    assert str(folder) in str(error.value)
    assert not ran.exists()


def test_points_that_are_none_are_named(folder: Path) -> None:
    put(folder, b"\x80\x04 no pickle")
    with pytest.raises(StoreError, match=r"storage\.sqlite holds what is no point"):
        opened(folder)
    (folder / "collection" / "c" / "storage.sqlite").write_bytes(b"no database" * 100)
    with pytest.raises(StoreError, match=r"storage\.sqlite"):
        opened(folder)


def test_plain_values_are_let_through(folder: Path, rng: np.random.Generator) -> None:
    """Such as earlier clients stored: arrays, times, and models of the client's own."""
    for protocol in range(3, pickle.HIGHEST_PROTOCOL + 1):
        point = models.PointStruct.model_construct(
            id=0,
            vector={"text": rng.normal(size=D).astype(np.float32)},
            payload={"at": datetime(2024, 1, 2), "n": np.float32(3), "who": UUID(int=3), "s": {1}},
        )
        put(folder, pickle.dumps(point, protocol))
        refuse_code(folder, "here")
