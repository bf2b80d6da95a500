"""Kill `simskip refine` and `simskip rollback` at random instants, and look at what is left.

The process that forks never opens an index: building, running, and reading by the bare engine each
happen in a child of its own, which has everything imported already, so that a kill falls into the
work. What rows must hold is computed here, in double precision, from the formula of a refiner.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
import traceback
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import apsw
import faiss
import numpy as np
import pyarrow as pa
import qdrant_edge as edge
import sqlite_vec
from numpy.typing import NDArray
from qdrant_client import QdrantClient, models
from speed_cells import refiner

from simskip_vdb import Refiner, cli
from simskip_vdb.datatypes import ID_TEXT, Ids, Metric, Vectors

COMMANDS = REFINE, ROLLBACK = "refine", "rollback"
NEEDED = (  # by a run, which imports them when it comes to that
    "filelock",
    "ir_measures",
    "jinja2",
    "multiprocessing.synchronize",
    "pandas",
    "portalocker",
    "pyarrow.compute",
    "pytrec_eval",
    "simskip_vdb.clicks",
    "simskip_vdb.upkeep",
    "threadpoolctl",
)
QUERIES, NEIGHBOURS = 8, 5
NOTHING_TO_UNDO = 2  # the exit code of a rollback that finds originals
STAGES = (
    "before it was announced",
    "announced, no row changed",
    "some rows changed",
    "all rows changed, not confirmed",
    "confirmed",
)


class Rows(NamedTuple):
    """What an index holds and answers: rows by ascending id, and neighbours of its first rows."""

    ids: NDArray[np.int64]
    vectors: Vectors
    payload: NDArray[np.int64]
    found: NDArray[np.int64]


class Kind(ABC):
    """A kind of store: how an index of it is built, and read without the code under test.

    Attributes:
        name: What people call it.
        connector: The module that opens it; what that imports, other kinds do without.
        rows: Rows of an index.
        dim: Their dimension.
        metric: How they are compared.
        tolerance: How far a vector may be off; 0 for bit for bit.
    """

    name: str
    connector: str
    rows = 4000
    dim = 32
    metric = Metric.DOT
    tolerance = 0.0

    @property
    def ids(self) -> NDArray[np.int64]:
        """Row ids, ascending, with gaps."""
        return np.arange(self.rows) * 7 + 3

    @property
    def row_ids(self) -> Ids:
        """Row ids as a refiner knows them."""
        return self.ids

    def vectors(self) -> Vectors:
        """The vectors that an index is built of, unit length."""
        x = np.random.default_rng(5).standard_normal((self.rows, self.dim))
        return np.asarray(x / np.linalg.norm(x, axis=1, keepdims=True), np.float32)

    @abstractmethod
    def uri(self, folder: Path) -> str:
        """Address of the index in a folder."""

    @abstractmethod
    def build(self, folder: Path) -> None:
        """Make the index."""

    @abstractmethod
    def read(self, folder: Path) -> Rows:
        """Open the index, read every row, and search for the first ones."""


class Faiss(Kind):
    """A FAISS file: IVF Flat with ids of its own."""

    name = "FAISS IVF"
    connector = "faiss_store"

    def uri(self, folder: Path) -> str:
        return f"faiss:{folder / 'x.faiss'}"

    def build(self, folder: Path) -> None:
        faiss.omp_set_num_threads(1)
        lists = faiss.IndexFlatIP(self.dim)
        index = faiss.IndexIVFFlat(lists, self.dim, 16, faiss.METRIC_INNER_PRODUCT)
        index.nprobe = 16
        x = self.vectors()
        index.train(x)
        index.add_with_ids(x, self.ids)
        faiss.write_index(index, str(folder / "x.faiss"))

    def read(self, folder: Path) -> Rows:
        faiss.omp_set_num_threads(1)
        index = faiss.read_index(str(folder / "x.faiss"))
        ids, vectors = self.contents(index)
        order = np.argsort(ids)
        vectors = vectors[order]
        _, found = index.search(vectors[:QUERIES], NEIGHBOURS)
        return Rows(ids[order], vectors, np.zeros(len(ids), np.int64), found)

    def contents(self, index: Any) -> tuple[NDArray[np.int64], Vectors]:  # noqa: ANN401 FAISS
        """Return all ids and vectors, in any order."""
        lists = index.invlists
        ids, vectors = [], []
        for i in range(index.nlist):
            size = lists.list_size(i)
            ids.append(faiss.rev_swig_ptr(lists.get_ids(i), size).copy())
            codes = faiss.rev_swig_ptr(lists.get_codes(i), size * lists.code_size).copy()
            vectors.append(codes.view(np.float32).reshape(size, self.dim))
        return np.concatenate(ids), np.concatenate(vectors)


class FaissFlat(Faiss):
    """A FAISS file: Flat, whose ids are positions."""

    name = "FAISS Flat"

    @property
    def ids(self) -> NDArray[np.int64]:
        return np.arange(self.rows)

    def build(self, folder: Path) -> None:
        index = faiss.IndexFlatIP(self.dim)
        index.add(self.vectors())
        faiss.write_index(index, str(folder / "x.faiss"))

    def contents(self, index: Any) -> tuple[NDArray[np.int64], Vectors]:  # noqa: ANN401 FAISS
        return np.arange(index.ntotal), index.reconstruct_n(0, index.ntotal)


class Qdrant(Kind):
    """Points with a payload each, compared by cosine."""

    metric = Metric.COSINE

    @property
    def row_ids(self) -> Ids:
        return self.ids.astype(ID_TEXT)


class Edge(Qdrant):
    """A Qdrant Edge shard in a folder."""

    name = "Qdrant Edge"
    connector = "edge_store"

    def uri(self, folder: Path) -> str:
        return f"qdrant-edge:{folder / 'x'}"

    def build(self, folder: Path) -> None:
        path = folder / "x"
        path.mkdir()
        params = edge.EdgeVectorParams(self.dim, edge.Distance.Cosine)
        shard = edge.EdgeShard.create(str(path), edge.EdgeConfig(vectors=params))
        rows = zip(self.ids.tolist(), self.vectors().tolist(), strict=True)
        points = [edge.Point(point, row, {"n": point}) for point, row in rows]
        shard.update(edge.UpdateOperation.upsert_points(points))
        shard.flush()
        shard.close()

    def read(self, folder: Path) -> Rows:
        shard = edge.EdgeShard.load(str(folder / "x"))
        request = edge.ScrollRequest(limit=10**6, with_payload=True, with_vector=True)
        records = shard.scroll(request)[0]
        ids = np.array([int(str(record.id)) for record in records])
        order = np.argsort(ids)
        vectors = np.array([record.vector for record in records], np.float32)[order]
        found = [
            [int(str(hit.id)) for hit in shard.query(_asked(query))]
            for query in vectors[:QUERIES].tolist()
        ]
        payload = np.array([(record.payload or {})["n"] for record in records])[order]
        shard.close()
        return Rows(ids[order], vectors, payload, np.array(found))


def _asked(query: list[float]) -> edge.QueryRequest:
    return edge.QueryRequest(limit=NEIGHBOURS, query=edge.Query.Nearest(query, using=""))


class Local(Qdrant):
    """A folder of the Qdrant client's local mode, which commits each point by itself."""

    name = "Qdrant local"
    connector = "qdrant_store"
    rows = 300
    dim = 16
    tolerance = 1e-6

    def uri(self, folder: Path) -> str:
        return f"qdrant-local:{folder / 'x'}?collection=docs"

    def build(self, folder: Path) -> None:
        client = QdrantClient(path=str(folder / "x"))
        params = models.VectorParams(size=self.dim, distance=models.Distance.COSINE)
        client.create_collection("docs", params)
        rows = zip(self.ids.tolist(), self.vectors().tolist(), strict=True)
        client.upsert(
            "docs", [models.PointStruct(id=i, vector=row, payload={"n": i}) for i, row in rows]
        )
        client.close()

    def read(self, folder: Path) -> Rows:
        client = QdrantClient(path=str(folder / "x"))
        records, _ = client.scroll("docs", limit=10**6, with_vectors=True, with_payload=True)
        ids = np.array([record.id for record in records])
        order = np.argsort(ids)
        vectors = np.array([record.vector for record in records], np.float32)[order]
        found = [
            [hit.id for hit in client.query_points("docs", query, limit=NEIGHBOURS).points]
            for query in vectors[:QUERIES].tolist()
        ]
        payload = np.array([(record.payload or {})["n"] for record in records])[order]
        client.close()
        return Rows(ids[order], vectors, payload, np.array(found))


class SqliteVec(Kind):
    """A table of sqlite-vec."""

    name = "sqlite-vec"
    connector = "sqlite_store"
    metric = Metric.COSINE

    def uri(self, folder: Path) -> str:
        return f"sqlite-vec:{folder / 'x.db'}"

    def build(self, folder: Path) -> None:
        with closing(sqlite(folder)) as db, db:
            columns = (
                f"id integer primary key, v float[{self.dim}] distance_metric=cosine, +n integer"
            )
            db.execute(f"CREATE VIRTUAL TABLE docs USING vec0({columns})")
            rows = zip(self.ids.tolist(), self.vectors(), strict=True)
            values = ((key, row.tobytes(), key) for key, row in rows)
            db.executemany("INSERT INTO docs (id, v, n) VALUES (?, ?, ?)", values)

    def read(self, folder: Path) -> Rows:
        with closing(sqlite(folder)) as db:
            rows = list(db.execute("SELECT id, v, n FROM docs ORDER BY id"))
            vectors = np.array([np.frombuffer(v, np.float32) for _, v, _ in rows])
            near = "SELECT id FROM docs WHERE v MATCH ? AND k = ?"
            found = [
                [key for (key,) in db.execute(near, (query.tobytes(), NEIGHBOURS))]
                for query in vectors[:QUERIES]
            ]
        ids, payload = (np.array([row[at] for row in rows]) for at in (0, 2))
        return Rows(ids, vectors, payload, np.array(found))


def sqlite(folder: Path) -> Any:  # noqa: ANN401 a connection of apsw
    """Open a file of SQLite in a folder, with sqlite-vec."""
    db = apsw.Connection(str(folder / "x.db"))
    db.enable_load_extension(True)
    db.load_extension(sqlite_vec.loadable_path())
    return db


class Lance(Kind):
    """A LanceDB table, which is written several thousand rows a version."""

    name = "LanceDB"
    connector = "lance_store"
    rows = 20_000

    def uri(self, folder: Path) -> str:
        return f"lancedb:{folder / 'x'}?metric=dot"

    def build(self, folder: Path) -> None:
        import lancedb

        flat = pa.array(self.vectors().ravel())
        rows = {
            "id": self.ids,
            "vector": pa.FixedSizeListArray.from_arrays(flat, self.dim),
            "n": self.ids,
        }
        lancedb.connect(folder / "x").create_table("docs", pa.table(rows))

    def read(self, folder: Path) -> Rows:
        import lancedb

        table = lancedb.connect(folder / "x").open_table("docs")
        rows = table.to_arrow().sort_by("id")
        numbers = np.concatenate([part.flatten().to_numpy() for part in rows["vector"].chunks])
        vectors = numbers.reshape(-1, self.dim)
        queries = table.search(vectors[:QUERIES], vector_column_name="vector")
        found = queries.distance_type("dot").limit(NEIGHBOURS).select(["id", "_distance"])
        hits = found.to_arrow().sort_by([("query_index", "ascending"), ("_distance", "ascending")])
        return Rows(
            rows["id"].to_numpy(),
            vectors,
            rows["n"].to_numpy(),
            hits["id"].to_numpy().reshape(-1, NEIGHBOURS),
        )


class Chroma(Kind):
    """A collection of Chroma, whose search passes every row."""

    name = "Chroma"
    connector = "chroma_store"
    rows = 700

    @property
    def row_ids(self) -> Ids:
        return self.ids.astype(ID_TEXT)

    def uri(self, folder: Path) -> str:
        return f"chroma:{folder / 'x'}"

    def build(self, folder: Path) -> None:
        import chromadb

        docs = chromadb.PersistentClient(str(folder / "x")).create_collection(
            "docs",
            embedding_function=None,
            configuration={"hnsw": {"space": "ip", "ef_search": self.rows}},
        )
        docs.add(
            ids=[str(key) for key in self.ids],
            embeddings=self.vectors(),
            metadatas=[{"n": key} for key in self.ids.tolist()],
        )

    def read(self, folder: Path) -> Rows:
        import chromadb

        client = chromadb.PersistentClient(str(folder / "x"))
        docs = client.get_collection("docs", embedding_function=None)
        rows = docs.get(include=["embeddings", "metadatas"])
        ids = np.array(rows["ids"], np.int64)
        order = np.argsort(ids)
        vectors = np.asarray(rows["embeddings"], np.float32)[order]
        payload = np.array([row["n"] for row in rows["metadatas"] or []])[order]
        found = docs.query(query_embeddings=vectors[:QUERIES], n_results=NEIGHBOURS)["ids"]
        return Rows(ids[order], vectors, payload, np.array(found).astype(np.int64))


KINDS: tuple[Kind, ...] = (FaissFlat(), Faiss(), Edge(), Local(), SqliteVec(), Lance(), Chroma())


@dataclass
class Outcome:
    """What became of the kills of one kind of store.

    Attributes:
        kills: Kills by command.
        stages: Kills by command and by how far the index and its state had come.
        resumed: Trials that ended by the same command, as a run ends that was never killed.
        rolled_back: Trials that ended by a rollback, with what was there at first.
        failures: What did not hold, and where.
        missed: Kills that came after the command had ended.
    """

    kills: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COMMANDS, 0))
    stages: dict[str, dict[str, int]] = field(
        default_factory=lambda: {command: dict.fromkeys(STAGES, 0) for command in COMMANDS}
    )
    resumed: int = 0
    rolled_back: int = 0
    missed: int = 0
    failures: list[str] = field(default_factory=list)


class Campaign:
    """Kills one kind of store, over and over.

    Args:
        kind: The kind of store.
        work: An empty folder.
        rng: Draws the instants, and what happens after a kill.
    """

    def __init__(self, kind: Kind, work: Path, rng: np.random.Generator) -> None:
        self.kind, self.work, self.rng = kind, work, rng
        self.outcome = Outcome()
        for module in (*NEEDED, f"simskip_vdb.connectors.{kind.connector}"):
            import_module(module)
        self._first, self._now, self._refiner = work / "first", work / "now", work / "refiner"
        self._first.mkdir(parents=True)
        fitted = moving(kind)
        fitted.save(self._refiner)
        self._must(lambda: kind.build(self._first))
        self.old = self._read(self._first)
        expect(np.array_equal(self.old.ids, kind.ids), "the index was not built")
        self._old_sha = self._sha(self._first)
        self.seconds = dict.fromkeys(COMMANDS, 0.0)
        self._run_both()
        self.new = self._read(self._now)
        self._new_sha = self._sha(self._now)
        expected = refined(fitted, kind.row_ids, self.old.vectors)
        moved = np.abs(self.old.vectors - expected).max(axis=1)
        expect(bool((moved > 1e-2).all()), "the refiner does not move every row")
        expect(np.allclose(self.new.vectors, expected, atol=2e-6), "refined otherwise than meant")

    def run(self, kills: int) -> Outcome:
        """Go on until refine was killed so many times."""
        trial = 0
        while self.outcome.kills[REFINE] < kills:
            trial += 1
            try:
                self._trial()
            except AssertionError as failure:
                self.outcome.failures.append(f"trial {trial}: {failure}")
        return self.outcome

    def _trial(self) -> None:
        self._fresh()
        self._kill(REFINE)
        if self.rng.random() < 0.5:
            self._finish(REFINE)
            if self.rng.random() < 0.5:
                self._kill(ROLLBACK)
                self._finish(REFINE if self.rng.random() < 0.5 else ROLLBACK)
        else:
            self._finish(ROLLBACK)

    def _finish(self, command: str) -> None:
        """Run a command until it ends by itself, once killed on the way or not."""
        if self.rng.random() < 0.5:
            self._kill(command)
        code = self._simskip(command)
        fine = (0, NOTHING_TO_UNDO) if command == ROLLBACK else (0,)
        expect(code in fine, f"{command} ended with {code}: {self._said()}")
        wanted, sha = (self.new, self._new_sha) if command == REFINE else (self.old, self._old_sha)
        now = self._read(self._now)
        expect(bool(self._are(now, wanted).all()), f"{command} ended elsewhere")
        expect(self._sha(self._now) == sha, f"{command} ended with another file")
        if command == REFINE:
            self.outcome.resumed += 1
        else:
            self.outcome.rolled_back += 1

    def _kill(self, command: str) -> None:
        """Run a command, kill it, and look at what is left."""
        delay = self.rng.uniform(0, self.seconds[command])
        if self._simskip(command, delay) != -signal.SIGKILL:
            self.outcome.missed += 1
            return
        self.outcome.kills[command] += 1
        now = self._read(self._now)
        old, new = self._are(now, self.old), self._are(now, self.new)
        expect(bool((old | new).all()), f"{(~(old | new)).sum()} rows are neither old nor new")
        share = float((new if command == REFINE else old).mean())
        self.outcome.stages[command][self._stage(command, share)] += 1

    def _stage(self, command: str, share: float) -> str:
        manifests = list(self._now.glob("**/manifest.json"))
        manifest = json.loads(manifests[0].read_text()) if manifests else {}
        if manifest.get("pending"):
            return STAGES[1 if share == 0 else 2 if share < 1 else 3]
        refined_now = bool(manifest.get("current"))
        return STAGES[4 if refined_now is (command == REFINE) else 0]

    def _are(self, now: Rows, wanted: Rows) -> NDArray[np.bool_]:
        """Tell which rows are as wanted, shape (n,); ids, payload and answers must be right."""
        expect(np.array_equal(now.ids, self.kind.ids), "rows were lost, doubled or renamed")
        expect(np.array_equal(now.payload, self.old.payload), "payload changed")
        x = now.vectors.astype(np.float64)
        scores = x[:QUERIES] @ x.T
        best = np.sort(scores, axis=1)[:, -NEIGHBOURS:]
        expect(now.found.shape == (QUERIES, NEIGHBOURS), "a search found too little")
        answered = scores[np.arange(QUERIES)[:, None], np.searchsorted(now.ids, now.found)]
        expect(np.allclose(answered[:, ::-1], best, atol=1e-5), "a search found other rows")
        if self.kind.tolerance:
            near = np.abs(now.vectors - wanted.vectors).max(axis=1) <= self.kind.tolerance
        else:
            near = (now.vectors.view(np.uint32) == wanted.vectors.view(np.uint32)).all(axis=1)
        return np.asarray(near)

    def _run_both(self) -> None:
        """Measure each command, and leave the index refined."""
        times: dict[str, list[float]] = {command: [] for command in COMMANDS}
        for _ in range(3):
            self._fresh()
            for command in (REFINE, ROLLBACK, REFINE):
                start = time.monotonic()
                code = self._simskip(command)
                expect(code == 0, f"{command} ended with {code}: {self._said()}")
                times[command].append(time.monotonic() - start)
        self.seconds = {command: float(np.median(found)) for command, found in times.items()}

    def _fresh(self) -> None:
        shutil.rmtree(self._now, ignore_errors=True)
        shutil.copytree(self._first, self._now)

    def _simskip(self, command: str, kill_after: float | None = None) -> int:
        arguments = [command, self.kind.uri(self._now)]
        if command == REFINE:
            arguments += ["--refiner", str(self._refiner), "--accept-unmeasured"]

        def work() -> None:
            output = os.open(self.work / "output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            sys.argv = ["simskip", *arguments]
            cli.main()

        return in_child(work, kill_after)

    def _said(self) -> str:
        return (self.work / "output").read_text()[-2000:]

    def _read(self, folder: Path) -> Rows:
        file = self.work / "rows.npz"
        file.unlink(missing_ok=True)
        self._must(lambda: np.savez(file, **self.kind.read(folder)._asdict()))
        with np.load(file) as found:
            return Rows(**found)

    def _must(self, work: Callable[[], None]) -> None:
        code = in_child(work)
        expect(code == 0, "the index does not open and answer")

    def _sha(self, folder: Path) -> bytes:
        """The bytes of an index that is one file."""
        file = folder / "x.faiss"
        return file.read_bytes() if file.is_file() else b""


def expect(holds: bool, message: str) -> None:
    """Raise AssertionError where something does not hold, whatever the interpreter's flags."""
    if not holds:
        raise AssertionError(message)


def in_child(work: Callable[[], object], kill_after: float | None = None) -> int:
    """Run something in a fork of this process; return its exit code, negative for a signal."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "lancedb fork support is experimental")
        child = os.fork()
    if child == 0:
        try:
            work()
        except SystemExit as ended:
            os._exit(ended.code if isinstance(ended.code, int) else 1)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def moving(kind: Kind) -> Refiner:
    """Make a refiner that moves every row by f, and a fifth of them by an offset as well."""
    made = refiner(kind.dim, np.sort(kind.row_ids)[::5], kind.metric)
    layers = tuple((weight, bias + np.float32(0.1)) for weight, bias in made.layers)
    return replace(made, alpha=2.0, layers=layers)


def refined(fitted: Refiner, ids: Ids, x: Vectors) -> NDArray[np.float64]:
    """Refine rows by the formula, row by row in double precision."""
    offsets = dict(zip(fitted.offset_ids.tolist(), fitted.offsets.astype(np.float64), strict=True))
    out = np.empty(x.shape)
    for at, (name, row) in enumerate(zip(ids.tolist(), x.astype(np.float64), strict=True)):
        norm = np.sqrt((row**2).sum())
        apart = row / norm - fitted.origin
        distance = np.sqrt((apart**2).sum())
        h = direction = apart / distance
        for number, (weight, bias) in enumerate(fitted.layers):
            h = (weight.astype(np.float64) * h).sum(axis=1) + bias
            if number < len(fitted.layers) - 1:
                h = np.maximum(h, 0)
        y = direction + fitted.alpha * h + fitted.beta * offsets.get(name, 0.0)
        y = fitted.origin + distance * y / np.sqrt((y**2).sum())
        out[at] = norm * y / np.sqrt((y**2).sum())
    return out


def table(stores: dict[str, Any]) -> str:
    """Return results of several kinds of stores as a table in Markdown."""
    lines = [
        "| store | rows | killed | " + " | ".join(STAGES) + " | resumed | rolled back | failures |",
        "|---" * (len(STAGES) + 6) + "|",
    ]
    for name, store in stores.items():
        for command in COMMANDS:
            fell = store["stages"][command]
            ended = (store["resumed"], store["rolled_back"], len(store["failures"]))
            cells = [
                name if command == REFINE else "",
                f"{store['rows']:,}" if command == REFINE else "",
                f"{command} {store['kills'][command]}",
                *(str(fell[stage]) for stage in STAGES),
                *(str(number) if command == REFINE else "" for number in ended),
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
