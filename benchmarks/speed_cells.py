"""What `speed.py` measures of one index, each in a process of its own."""

from __future__ import annotations

import importlib
import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import machine
import numpy as np

import simskip_vdb as ss
from simskip_vdb import pipeline
from simskip_vdb.config import FitSettings, Signal
from simskip_vdb.datatypes import ID_TEXT, Ids, Metric, Side, VectorBatch, Vectors
from simskip_vdb.journal import Journal
from simskip_vdb.reindex import snapshot
from simskip_vdb.rows import row_digests
from simskip_vdb.through_index import ThroughIndex

BLOCK, PAGE = 8192, 256
LARGE = 500_000
INTRINSIC_DIM = 16


class Cell(NamedTuple):
    """One index that is measured, and the folder where it is."""

    store: str
    rows: int
    dim: int
    folder: str

    @property
    def path(self) -> Path:
        """The index."""
        return Path(self.folder) / "index"

    @property
    def is_edge(self) -> bool:
        """Whether it is a shard of Qdrant Edge."""
        return self.store == "edge"

    @property
    def is_large_graph(self) -> bool:
        """Whether building it once more, to bring it back or to time that alone, takes too long."""
        return self.store in ("hnsw", "edge") and self.rows > LARGE

    @property
    def uri(self) -> str:
        """Its address."""
        return f"{'qdrant-edge' if self.is_edge else 'faiss'}:{self.path}"

    def blocks(self) -> Iterator[Vectors]:
        """Yield its rows, unit vectors near a subspace as embeddings are."""
        mix = np.random.default_rng(0).normal(size=(INTRINSIC_DIM, self.dim)).astype(np.float32)
        for start in range(0, self.rows, BLOCK):
            rng = np.random.default_rng((1, start))
            size = min(BLOCK, self.rows - start)
            rows = rng.normal(size=(size, INTRINSIC_DIM)).astype(np.float32) @ mix
            rows += rng.normal(size=rows.shape).astype(np.float32)
            yield rows / np.linalg.norm(rows, axis=1, keepdims=True)

    def ids(self) -> Ids:
        """Return the rows' ids in scan order, shape (n,)."""
        ids = np.arange(self.rows)
        return ids.astype(ID_TEXT) if self.is_edge else ids

    def offset_ids(self) -> Ids:
        """Return the ids of the rows with an offset, ascending."""
        return np.sort(self.ids()[::20])


def build(cell: Cell) -> dict[str, Any]:
    """Build an index with the bare engine and save a refiner for it; return what it took."""
    moving = refiner(cell.dim, cell.offset_ids(), Metric.DOT)
    # A random move must be small to leave an index as good at finding neighbours.
    replace(moving, alpha=0.02, beta=0.1).save(Path(cell.folder) / "refiner")
    begin = time.perf_counter()
    (_build_shard if cell.is_edge else _build_faiss)(cell)
    return {"seconds": time.perf_counter() - begin, "bytes": _size(cell.path)}


def refiner(dim: int, offset_ids: Ids, metric: Metric) -> ss.Refiner:
    """Return a refiner as a fit would make it, of random numbers."""
    rng = np.random.default_rng(1)
    widths = (dim, dim // 2, dim, dim)
    layers = tuple(
        (
            (rng.normal(size=(wide, narrow)) / np.sqrt(narrow)).astype(np.float32),
            np.zeros(wide, np.float32),
        )
        for narrow, wide in pairwise(widths)
    )
    return ss.Refiner(
        dim=dim,
        side=Side.DOCS,
        metric=metric,
        alpha=0.3,
        beta=1.0,
        origin=np.full(dim, 0.5 / dim**0.5, np.float32),
        layers=layers,
        offset_ids=offset_ids,
        offsets=(0.02 * rng.normal(size=(len(offset_ids), dim))).astype(np.float32),
    )


def _build_faiss(cell: Cell) -> None:
    import faiss

    lists = max(4, math.isqrt(cell.rows))
    kinds = {"flat": "Flat", "ivf": f"IVF{lists},Flat", "hnsw": "HNSW32"}
    index = faiss.index_factory(cell.dim, kinds[cell.store], faiss.METRIC_INNER_PRODUCT)
    # Wide enough for what is found not to depend on how a graph or lists came out this time.
    if cell.store == "hnsw":
        index.hnsw.efSearch = 256
    if cell.store == "ivf":
        index.nprobe = lists // 4
        index.train(np.concatenate([*cell.blocks()]))
    for block in cell.blocks():
        index.add(block)
    faiss.write_index(index, str(cell.path))


def _build_shard(cell: Cell) -> None:
    import qdrant_edge as edge

    cell.path.mkdir()
    settings = edge.EdgeVectorParams(size=cell.dim, distance=edge.Distance.Dot)
    with closing(edge.EdgeShard.create(str(cell.path), edge.EdgeConfig(vectors=settings))) as shard:
        for first, page in _pages(cell):
            points = [edge.Point(first + at, row) for at, row in enumerate(page)]
            shard.update(edge.UpdateOperation.upsert_points(points))
        shard.flush()
        shard.optimize()
        shard.flush()


def _pages(cell: Cell) -> Iterator[tuple[int, list[list[float]]]]:
    """Yield pages of rows as the engine takes them, each with the number of its first row."""
    first = 0
    for block in cell.blocks():
        for start in range(0, len(block), PAGE):
            page = block[start : start + PAGE].tolist()
            yield first, page
            first += len(page)


def refine(cell: Cell) -> dict[str, Any]:
    """Refine the index as `simskip refine --refiner` does, and bring a small one back."""
    for module in ("faiss", "filelock", "ir_measures", "pyarrow.ipc", "scipy.stats"):
        importlib.import_module(module)
    spent = {"look": 0.0, "look_cpu": 0.0, "index": 0.0, "index_cpu": 0.0}
    _timed(ThroughIndex, "look", spent, "look")
    if cell.is_edge:
        from simskip_vdb.connectors.edge_store import EdgeStore

        _timed(EdgeStore, "settle", spent, "index")
    settings = ss.Settings(refiner=Path(cell.folder) / "refiner", accept_unmeasured=True)
    machine.reset_peak()
    resident = machine.memory("VmRSS")
    begin, busy = time.perf_counter(), time.process_time()
    with _opened(cell) as store:
        report = pipeline.refine(store, ss.Judgments(), settings)
        seconds, cpu = time.perf_counter() - begin, time.process_time() - busy
        peak, spent = machine.memory("VmHWM") - resident, dict(spent)
        assert report.written is not None, report
        assert report.written["rows"] == cell.rows, report.gate
        if not cell.is_large_graph:
            ss.rollback(store)
    stages = dict(report.seconds)
    return {"seconds": seconds, "cpu": cpu, "stages": stages, "peak": peak, **spent}


def limits(cell: Cell) -> dict[str, Any]:
    """Measure what the machine and the bare engine can do at most."""
    copy = min(_seconds(lambda: _copy(cell)) for _ in range(2))
    found = {"copy": copy, "read": copy, "write": copy}
    if cell.is_edge:
        found |= _edge_limits(cell)
    return found


def _copy(cell: Cell) -> None:
    target = Path(cell.folder) / "copy"
    if cell.is_edge:  # of its vectors; the engine's files are sparse
        target.write_bytes(bytes(4 * cell.rows * cell.dim))
    else:
        shutil.copyfile(cell.path, target)
    target.unlink()


class _Products:
    """Three bare matrix products of a refiner's shapes, in pieces of the size that BLAS likes."""

    def __init__(self, refiner: ss.Refiner) -> None:
        self._weights = [weight.T for weight, _ in refiner.layers]
        rows = np.ones((8192, refiner.dim), np.float32)
        self._rows = min((512, 1024, 8192), key=lambda piece: self._timed(rows, piece))

    def __call__(self, x: Vectors) -> float:
        """Return the seconds that they take."""
        return self._timed(x, self._rows, rounds=1)

    def _timed(self, x: Vectors, piece: int, rounds: int = 5) -> float:
        rooms = [np.empty((piece, weight.shape[1]), np.float32) for weight in self._weights]

        def products() -> None:
            for start in range(0, len(x), piece):
                h = x[start : start + piece]
                for weight, room in zip(self._weights, rooms, strict=True):
                    h = np.matmul(h, weight, out=room[: len(h)])

        return min(_seconds(products) for _ in range(rounds))


def _edge_limits(cell: Cell) -> dict[str, float]:
    import qdrant_edge as edge

    def scroll() -> None:
        start = None
        while True:
            request = edge.ScrollRequest(
                offset=start, limit=PAGE, with_payload=False, with_vector=[""]
            )
            records, start = shard.scroll(request)
            for record in records:
                _ = record.vector
            if start is None:
                return

    def update() -> None:
        for first, page in _pages(cell):
            changes = [edge.PointVectors(first + at, row) for at, row in enumerate(page)]
            shard.update(edge.UpdateOperation.update_vectors(changes))

    with closing(edge.EdgeShard.load(str(cell.path))) as shard:
        making = _seconds(lambda: [None for _ in cell.blocks()])
        return {"read": _seconds(scroll), "write": _seconds(update) - making}


def stages(cell: Cell) -> dict[str, Any]:
    """Measure each stage alone, and the bare products of what is moved."""
    moving = ss.Refiner.load(Path(cell.folder) / "refiner")
    ids = cell.ids()
    spent = {"apply": 0.0, "write": 0.0, "verify": 0.0}
    with _opened(cell) as store, Journal(Path(cell.folder) / "state", store.info()) as journal:
        begin = time.perf_counter()
        rows = snapshot(store, journal).rows
        read = time.perf_counter() - begin
        # Threads of BLAS spin for a while after a product, so the two are not done in turns.
        for start, block in rows.blocks():
            begin = time.perf_counter()
            moving.refine_rows(block, ids[start : start + len(block)])
            spent["apply"] += time.perf_counter() - begin
        bare = _Products(moving)
        products = sum(bare(block) for _, block in rows.blocks())
        batches = (
            VectorBatch(ids=rows.ids[start : start + len(block)], vectors=block)
            for start, block in rows.blocks()
        )
        begin = time.perf_counter()
        if cell.is_edge:
            for batch in batches:
                assert store.update(batch, lambda now: np.ones(len(now), np.bool_)).all()
        elif not cell.is_large_graph:
            with store.prepared(batches, keep=None, expected=store.sha256()) as candidate:
                candidate.commit()
        spent["write"] = time.perf_counter() - begin
        begin = time.perf_counter()
        for batch in store.scan(BLOCK):
            row_digests(batch.vectors)
        spent["verify"] = time.perf_counter() - begin
    return {"seconds": {"read": read, **spent}, "products": products}


def fit(cell: Cell) -> dict[str, Any]:
    """Time a step of the label-free fit, whose shapes are known, and its products alone."""
    times: list[float] = []

    def watch(stage: str, done: int, total: int) -> None:
        if stage == "fit":
            times.append(time.perf_counter())

    settings = ss.Settings(fit=FitSettings(signal=Signal.AUGMENT, steps=60))
    with _opened(cell) as store:
        pipeline.fit(store, ss.Judgments(), settings, progress=watch)
    import torch

    torch.set_float32_matmul_precision("medium")  # oneDNN's products, as while fitting
    b, d = settings.fit.batch_size, cell.dim
    x, z = torch.ones(b, d), torch.ones(2 * b, 128)
    weights = [torch.ones(shape) for shape in ((d, d // 2), (d // 2, d), (d, d), (d, d), (d, 128))]

    def forward() -> None:
        for _ in range(2):
            h = x
            for weight in weights:
                h = h @ weight
        z @ z.T

    products = 3 * min(_seconds(forward) for _ in range(20))  # backwards there are two for each
    return {"batch": b, "step": float(np.median(np.diff(times))), "products": products}


@contextmanager
def _opened(cell: Cell) -> Iterator[Any]:
    store = ss.open_store(cell.uri)
    try:
        yield store
    finally:
        if cell.is_edge:
            store.close()  # type: ignore[attr-defined]


def _timed(owner: Any, name: str, spent: dict[str, float], stage: str) -> None:  # noqa: ANN401
    """Add the time of every call of a method to a stage."""
    method = getattr(owner, name)

    def timed(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        begin, busy = time.perf_counter(), time.process_time()
        try:
            return method(*args, **kwargs)
        finally:
            spent[stage] += time.perf_counter() - begin
            spent[f"{stage}_cpu"] += time.process_time() - busy

    setattr(owner, name, timed)


def _seconds(do: Callable[[], object]) -> float:
    begin = time.perf_counter()
    do()
    return time.perf_counter() - begin


def _size(path: Path) -> int:
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.stat().st_blocks * 512 for file in files if file.is_file())


COMMANDS: dict[str, Callable[[Cell], dict[str, Any]]] = {
    "build": build,
    "refine": refine,
    "limits": limits,
    "stages": stages,
    "fit": fit,
}
