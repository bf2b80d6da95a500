"""Fill a FAISS index again with new vectors: same type, parameters, ids and order."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

import faiss
import numpy as np
from numpy.typing import NDArray

from simskip_vdb.connectors.faiss_gpu import on_gpu
from simskip_vdb.connectors.faiss_layout import Layout
from simskip_vdb.connectors.faiss_lists import ListFile, ListWriter, ivf_of, list_file
from simskip_vdb.connectors.faiss_open import faiss_call, read_limited
from simskip_vdb.connectors.faiss_training import (
    draw,
    learns,
    sample_size,
    span,
    spans_unseen_ranges,
    train,
)
from simskip_vdb.connectors.faiss_tree import (
    ID_MAPS,
    IVF,
    NSG,
    REFINES,
    Index,
    core,
    down,
    transforms,
    wrappers,
)
from simskip_vdb.datatypes import Vectors

_ROWS = 8192


def rebuild(
    path: Path, layout: Layout, rows: Iterable[Vectors], lists: ListFile | None = None
) -> Index:
    """Return a writable index like the one at `path` that holds these vectors.

    Args:
        path: The index file.
        layout: That file, opened for reading.
        rows: Every row's vector in scan order, in batches of shape (b, d).
        lists: Where its lists go, if that index keeps them in a file of their own.

    Raises:
        StoreError: FAISS or the disk failed.
    """
    if not learns(layout.root):
        index = _emptied(path)
        _fill(path, index, layout, rows)
        return index
    with _spool_file(path) as spool:
        sample, extremes = _spool(path, layout, rows, spool)
        index = _emptied(path)
        with faiss_call(path, "training", long=True):
            train(index, sample, extremes)
            del sample
            if spans_unseen_ranges(index):
                span(index, _as_stored(index, _unspool(path, layout.dim, spool)))
        homes = None
        streams = lists is not None and type(core(index)) in IVF
        if streams or type(core(index)) is faiss.IndexIVFFlat:
            homes = _homes(path, index, _unspool(path, layout.dim, spool))
        _fill(path, index, layout, _unspool(path, layout.dim, spool), homes, lists)
        if lists is not None and not streams:
            _move_lists(path, ivf_of(index), layout, lists)
    return index


def _emptied(path: Path) -> Index:
    """Read a private copy without its rows; an id map stays, as its rows come in its order."""
    with faiss_call(path, "reading"):
        # The flag leaves an IVF's rows in the file; other vectors' memory is filled again.
        index = read_limited(path, faiss.IO_FLAG_MMAP)
        _empty(core(index))
    return index


def _empty(index: Index) -> None:
    if type(index) in REFINES:
        _empty(core(down(index.base_index)))
        for part in wrappers(down(index.base_index)):
            part.ntotal = 0
        down(index.refine_index).reset()
        index.ntotal = 0
        return
    lists = faiss.downcast_InvertedLists(index.invlists) if type(index) in IVF else None
    if type(lists) is faiss.OnDiskInvertedLists:
        lists = faiss.ArrayInvertedLists(index.nlist, index.code_size)
        index.replace_invlists(lists, True)
        lists.this.disown()
    index.reset()


def _fill(
    path: Path,
    index: Index,
    layout: Layout,
    rows: Iterable[Vectors],
    homes: NDArray[np.int64] | None = None,
    lists: ListFile | None = None,
) -> None:
    """Add rows to the core; what wraps it keeps its own ids and only counts."""
    body = core(index)
    rows = _as_stored(index, rows)
    if type(body) in IVF:
        _fill_ivf(path, body, layout, rows, homes, lists)
    elif type(body) in NSG:
        blocks = list(rows)  # its graph is built at once, over all rows
        if blocks:
            with faiss_call(path, "building the graph", long=True):
                body.add(np.concatenate(blocks))
    else:
        for vectors in rows:
            with faiss_call(path, "adding rows", long=True):
                body.add(vectors)
    for part in wrappers(index):
        part.ntotal = layout.root.ntotal


def _as_stored(index: Index, rows: Iterable[Vectors]) -> Iterator[Vectors]:
    """Yield rows as the core gets them, transformed."""
    chains = [part for part in wrappers(index) if type(part) is faiss.IndexPreTransform]
    for vectors in rows:
        for chain in chains:
            for transform in transforms(chain):
                vectors = transform.apply(vectors)
        yield vectors


def _fill_ivf(
    path: Path,
    ivf: Index,
    layout: Layout,
    rows: Iterable[Vectors],
    homes: NDArray[np.int64] | None,
    lists: ListFile | None,
) -> None:
    ids = _own_ids(layout)
    # An array map takes no explicit ids while rows are added.
    direct_map = ivf.direct_map.type
    ivf.set_direct_map_type(faiss.DirectMap.NoMap)
    writer = None
    if homes is not None:
        writer = _make_room(path, ivf, homes, lists)
    done = 0
    for vectors in rows:
        here = slice(done, done + len(vectors))
        done += len(vectors)
        with faiss_call(path, "adding rows", long=True):
            if homes is None:
                ivf.add_with_ids(vectors, ids[here])
            elif writer is None:
                # FAISS gets bare pointers, so each array must have a name while it works.
                own_ids, own_homes = ids[here], homes[here]
                ivf.add_core(len(vectors), *map(faiss.swig_ptr, (vectors, own_ids, own_homes)))
            else:
                _encode(ivf, writer, vectors, ids[here], homes[here])
    if writer is not None:
        _take_lists(path, ivf, layout, writer)
    with faiss_call(path, "mapping ids"):
        # An IVF also counts rows that it dropped for not being finite, and numbers on from there.
        ivf.ntotal = core(layout.root).ntotal
        ivf.set_direct_map_type(direct_map)


def _own_ids(layout: Layout) -> NDArray[np.int64]:
    """Return the ids in the lists: under an id map, rows are numbered by position."""
    mapped = any(type(part) in ID_MAPS for part in wrappers(layout.root))
    return np.arange(len(layout)) if mapped else layout.ids


def _homes(path: Path, index: Index, rows: Iterable[Vectors]) -> NDArray[np.int64]:
    """Return each row's list; -1 for rows that an IVF drops."""
    found = [np.empty(0, np.int64)]
    with faiss_call(path, "assigning rows to lists", long=True):
        quantizer = on_gpu(down(core(index).quantizer))
        for vectors in _as_stored(index, rows):
            found.append(quantizer.search(vectors, 1)[1][:, 0])
    return np.concatenate(found)


def _make_room(
    path: Path, ivf: Index, homes: NDArray[np.int64], lists: ListFile | None
) -> ListWriter | None:
    """Give lists their full size at once, in memory or in a file.

    Lists that grow by doubling would need up to twice the memory of the index.
    """
    sizes = np.bincount(homes[homes >= 0], minlength=ivf.nlist)
    if lists is not None:
        return ListWriter(lists, sizes, ivf.code_size)
    with faiss_call(path, "making room for rows"):
        for home, size in enumerate(sizes.tolist()):
            ivf.invlists.resize(home, size)
            ivf.invlists.resize(home, 0)
    return None


def _encode(
    ivf: Index,
    writer: ListWriter,
    vectors: Vectors,
    ids: NDArray[np.int64],
    homes: NDArray[np.int64],
) -> None:
    kept = homes >= 0
    vectors, homes = vectors[kept], homes[kept]
    codes = np.empty((len(homes), ivf.code_size), np.uint8)
    ivf.encode_vectors(len(homes), *map(faiss.swig_ptr, (vectors, homes, codes)))
    writer.add(homes, codes, ids[kept])


def _move_lists(path: Path, ivf: Index, layout: Layout, lists: ListFile) -> None:
    """Write lists that were filled in memory to a file."""
    with faiss_call(path, "writing lists"):
        held = faiss.downcast_InvertedLists(ivf.invlists)
        sizes = np.array([held.list_size(i) for i in range(ivf.nlist)], np.int64)
        writer = ListWriter(lists, sizes, ivf.code_size)
        for home in np.flatnonzero(sizes).tolist():
            size = int(sizes[home])
            codes = faiss.rev_swig_ptr(held.get_codes(home), size * ivf.code_size)
            ids = faiss.rev_swig_ptr(held.get_ids(home), size)
            writer.add(np.full(size, home), codes.reshape(size, -1), ids)
    _take_lists(path, ivf, layout, writer)


def _take_lists(path: Path, ivf: Index, layout: Layout, writer: ListWriter) -> None:
    old = list_file(layout.root, path)
    assert old is not None
    with faiss_call(path, "writing lists"):
        lists = writer.finish(like=old.path)
        ivf.replace_invlists(lists, True)
        lists.this.disown()


def _spool_file(path: Path) -> IO[bytes]:
    with faiss_call(path, "making a temporary file"):
        # Nameless, so that a kill leaves nothing behind.
        return tempfile.TemporaryFile(dir=path.parent)


def _spool(
    path: Path, layout: Layout, rows: Iterable[Vectors], file: IO[bytes]
) -> tuple[Vectors, Vectors | None]:
    """Write rows to a file on the way to memory.

    Returns:
        Rows to train on, all finite, and each dimension's least and largest value, shape (2, d);
        None without a finite row.
    """
    chosen = draw(len(layout), sample_size(layout.root))
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
    return sample[:filled], np.stack([low, high]) if filled else None


def _unspool(path: Path, dim: int, file: IO[bytes]) -> Iterator[Vectors]:
    """Yield the rows; read, since mapped pages would count as memory."""
    start = 0
    while True:
        with faiss_call(path, "reading a temporary file"):
            file.seek(start * dim * 4)
            vectors = np.fromfile(file, np.float32, _ROWS * dim).reshape(-1, dim)
        if len(vectors) == 0:
            return
        yield vectors
        start += len(vectors)
