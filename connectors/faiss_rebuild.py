"""Fill a FAISS index again with new vectors: same type, parameters, ids and order.

Everything that was learned from the old vectors (centroids, ranges, codebooks) is learned again
from the new ones, since centroids of the old vectors cost recall. FAISS trains neither a
quantiser that holds centroids already nor one that says it is trained, so each level is told to.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import faiss
import numpy as np
from numpy.typing import NDArray

from simskip_vdb.connectors.faiss_layout import (
    CODEBOOKS,
    FLAT,
    IVF,
    Index,
    Layout,
    base_of,
    body_of,
    is_trained_on_rows,
)
from simskip_vdb.datatypes import Vectors
from simskip_vdb.errors import StoreError

_SEED = 0
_POINTS_PER_CENTROID = 256
_LEAST_SAMPLE = 16384
_ROWS = 8192


@contextmanager
def faiss_call(path: Path, doing: str) -> Iterator[None]:
    """Run FAISS on few threads, and turn its errors and the system's into `StoreError`.

    FAISS brings an OpenMP runtime of its own; beside torch's, whose threads spin while they wait,
    two threads on two cores searched 7 to 20 times slower than one. Half the cores leave room.
    """
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(max(1, (os.cpu_count() or 1) // 2))
    try:
        yield
    except OSError as error:
        raise StoreError(f"{path}: {doing}: {error.strerror or error}") from error
    except (RuntimeError, AssertionError, MemoryError) as error:
        raise StoreError(f"{path}: {doing}: {_short(error)}") from error
    finally:
        faiss.omp_set_num_threads(threads)


def rebuild(path: Path, layout: Layout, rows: Iterable[Vectors]) -> Index:
    """Return a writable index like the one at `path` that holds these vectors.

    Args:
        path: The index file.
        layout: That file, opened for reading.
        rows: Every row's vector in scan order, in batches of shape (b, d).

    Raises:
        StoreError: FAISS or the disk failed.
    """
    body = body_of(layout.root)
    if not is_trained_on_rows(base_of(body)):
        index = _emptied(path)
        _fill(path, body_of(index), rows)
        return index
    with _spool_file(path) as spool:
        sample = _spool(path, layout, rows, spool)
        index = _emptied(path)
        with faiss_call(path, "training"):
            _train(base_of(body_of(index)), sample)
        del sample
        if type(body) is faiss.IndexIVFFlat:
            _fill_lists(path, body_of(index), layout, spool)
        else:
            _fill(path, body_of(index), (rows for _, rows in _unspool(path, layout.dim, spool)))
    return index


def _emptied(path: Path) -> Index:
    """Read a private copy without its rows; an id map stays, as its rows come in its order."""
    with faiss_call(path, "reading"):
        # The flag leaves an IVF's rows in the file; other vectors' memory is filled again.
        index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP)
        base = base_of(body_of(index))
        if type(base) in IVF:
            lists = faiss.ArrayInvertedLists(base.nlist, base.code_size)
            base.replace_invlists(lists, True)
            lists.this.disown()
        body_of(index).reset()
    return index


def _fill(path: Path, body: Index, rows: Iterable[Vectors]) -> None:
    for vectors in rows:
        with faiss_call(path, "adding rows"):
            body.add(vectors)


def _fill_lists(path: Path, ivf: Index, layout: Layout, spool: IO[bytes]) -> None:
    """Add rows with their ids to an IVF Flat, in lists that get their full size first.

    Lists that grow by doubling would need up to twice the memory of the index.
    """
    old = body_of(layout.root)
    # Under an id map, rows are numbered by position.
    ids = layout.ids if old is layout.root else np.arange(len(layout))
    # An array map takes no explicit ids while rows are added.
    direct_map = ivf.direct_map.type
    ivf.set_direct_map_type(faiss.DirectMap.NoMap)
    homes = np.empty(len(ids), np.int64)
    for here, vectors in _unspool(path, ivf.d, spool):
        with faiss_call(path, "assigning rows to lists"):
            homes[here] = ivf.quantizer.search(vectors, 1)[1][:, 0]
    for home, size in enumerate(np.bincount(homes[homes >= 0], minlength=ivf.nlist).tolist()):
        ivf.invlists.resize(home, size)
        ivf.invlists.resize(home, 0)
    for here, vectors in _unspool(path, ivf.d, spool):
        # FAISS gets bare pointers, so each array must have a name while it works.
        own_ids, own_homes = ids[here], homes[here]
        with faiss_call(path, "adding rows"):
            ivf.add_core(len(vectors), *map(faiss.swig_ptr, (vectors, own_ids, own_homes)))
    with faiss_call(path, "mapping ids"):
        # An IVF also counts rows that it dropped for not being finite, and numbers on from there.
        ivf.ntotal = old.ntotal
        ivf.set_direct_map_type(direct_map)


def _train(base: Index, sample: Vectors) -> None:
    """Learn from a sample of the new vectors; too small a sample leaves what was learned."""
    has_lists = type(base) in IVF
    has_codebooks = type(base) in CODEBOOKS
    least = max(base.nlist if has_lists else 1, base.pq.ksub if has_codebooks else 1)
    if len(sample) < least:
        return
    if has_lists:
        _forget_centroids(base)
    if has_codebooks:
        base.pq.cp.min_points_per_centroid = 1
    base.is_trained = False
    base.train(sample)


def _forget_centroids(ivf: Index) -> None:
    quantizer = faiss.downcast_index(ivf.quantizer)
    quantizer.reset()
    # None of these is in the file: this is how FAISS's constructor and factory set them, except
    # for the last, which keeps FAISS from printing a warning.
    ivf.cp.spherical = ivf.metric_type == faiss.METRIC_INNER_PRODUCT
    ivf.quantizer_trains_alone = 0 if type(quantizer) in FLAT else 2
    ivf.cp.min_points_per_centroid = 1


def _spool_file(path: Path) -> IO[bytes]:
    with faiss_call(path, "making a temporary file"):
        # Nameless, so that a kill leaves nothing behind.
        return tempfile.TemporaryFile(dir=path.parent)


def _spool(path: Path, layout: Layout, rows: Iterable[Vectors], file: IO[bytes]) -> Vectors:
    """Write rows to a file on the way to memory; return rows to train on, all finite."""
    base = base_of(body_of(layout.root))
    chosen = _chosen(len(layout), _sample_size(base))
    sample = np.empty((chosen.sum(), layout.dim), np.float32)
    low = np.full(layout.dim, np.inf, np.float32)
    high = -low
    done = filled = 0
    for vectors in rows:
        with faiss_call(path, "writing a temporary file"):
            vectors.tofile(file)
        finite = np.isfinite(vectors).all(axis=1)
        low = np.minimum(low, vectors[finite].min(axis=0, initial=np.inf))
        high = np.maximum(high, vectors[finite].max(axis=0, initial=-np.inf))
        here = vectors[chosen[done : done + len(vectors)] & finite]
        sample[filled : filled + len(here)] = here
        filled += len(here)
        done += len(vectors)
    if filled and _goes_by_range(base):
        return _range(base, low, high)
    return sample[:filled]


def _goes_by_range(base: Index) -> bool:
    is_scalar = type(base) is faiss.IndexScalarQuantizer
    return is_scalar and bool(base.sq.rangestat == faiss.ScalarQuantizer.RS_minmax)


def _range(quantizer: Index, low: Vectors, high: Vectors) -> Vectors:
    """Return two rows that span all rows, whose codes stay the same where nothing moved.

    FAISS cuts the range into 255 steps, rounds down, and decodes to the middle of a step. Ranges
    of decoded rows are therefore half a step too high, by which rows would drift at each rewrite.
    """
    widths = faiss.vector_to_array(quantizer.sq.trained)[quantizer.d :]
    spanning: Vectors = np.stack([low, high]) - widths / 255 / 2  # (2, d)
    return spanning


def _sample_size(base: Index) -> int:
    centroids = 1
    if type(base) in IVF:
        centroids = base.nlist
    if type(base) in CODEBOOKS:
        centroids = max(centroids, base.pq.ksub)
    return max(_LEAST_SAMPLE, _POINTS_PER_CENTROID * centroids)


def _chosen(count: int, size: int) -> NDArray[np.bool_]:
    """Draw the rows to train on, as a mask of shape (count,)."""
    chosen = np.zeros(count, np.bool_)
    rng = np.random.default_rng(_SEED)
    chosen[rng.choice(count, min(size, count), replace=False)] = True
    return chosen


def _unspool(path: Path, dim: int, file: IO[bytes]) -> Iterator[tuple[slice, Vectors]]:
    """Yield the rows with their positions; read, since mapped pages would count as memory."""
    start = 0
    while True:
        with faiss_call(path, "reading a temporary file"):
            file.seek(start * dim * 4)
            vectors = np.fromfile(file, np.float32, _ROWS * dim).reshape(-1, dim)
        if len(vectors) == 0:
            return
        yield slice(start, start + len(vectors)), vectors
        start += len(vectors)


def _short(error: BaseException) -> str:
    """Return FAISS's reason without its C++ signature."""
    text = str(error) or type(error).__name__
    return text.rpartition("' failed: ")[2].strip()
