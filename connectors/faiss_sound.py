"""Refuse a FAISS index whose numbers do not fit together.

FAISS checks much when it reads a file, but not whether its parts agree on dimensions and sizes; it
would then read outside its memory while it decodes or searches.
"""

from __future__ import annotations

from collections.abc import Iterator

import faiss

from simskip_vdb.connectors.faiss_tree import HNSW, IVF, NSG, RABITQ, Index, down
from simskip_vdb.errors import StoreError

_QUANTISERS = ("pq", "sq", "rq", "lsq", "prq", "plsq", "rabitq")
_DIRECT_MAPS = (faiss.DirectMap.NoMap, faiss.DirectMap.Array, faiss.DirectMap.Hashtable)
_MOST = 1 << 16
"""More probes or candidates than there are is common, until FAISS makes room for all of them."""


def check_lists(ivf: Index) -> None:
    """Check an IVF.

    Raises:
        StoreError: It is damaged.
    """
    quantizer = down(ivf.quantizer)
    _refuse_unless(ivf, (quantizer.d, quantizer.ntotal) == (ivf.d, ivf.nlist), "quantiser")
    _refuse_unless(ivf, ivf.direct_map.type in _DIRECT_MAPS, "direct map")
    _refuse_unless(ivf, ivf.nprobe <= max(ivf.nlist, _MOST), "nprobe")
    check_search(quantizer)
    check_codes(ivf)


def check_codes(index: Index) -> None:
    """Check what holds codes.

    Raises:
        StoreError: It is damaged.
    """
    _refuse_unless(index, all(_agreeing(index)), "code size")


def check_search(index: Index) -> None:
    """Check how many candidates a graph looks at.

    Raises:
        StoreError: FAISS would take all memory; or an NSG has fewer rows than search_L, which
            FAISS searches until it has found as many.
    """
    most = max(index.ntotal, _MOST)
    if type(index) in HNSW:
        _refuse_unless(index, 0 < index.hnsw.efSearch <= most, "efSearch")
        _refuse_unless(index, 0 < index.hnsw.efConstruction <= most, "efConstruction")
    if type(index) in NSG and index.ntotal and index.nsg.search_L > index.ntotal:
        raise StoreError(
            f"{type(index).__name__}: its search_L ({index.nsg.search_L}) exceeds its "
            f"{index.ntotal} rows, which FAISS searches for ever; set nsg.search_L lower and save"
        )


def _agreeing(index: Index) -> Iterator[bool]:
    kind = type(index)
    packed = "FastScan" in kind.__name__
    for name in _QUANTISERS:
        if hasattr(index, name):
            part = getattr(index, name)
            yield part.d == index.d and part.code_size == index.code_size
    if kind in RABITQ:
        yield 0 <= index.qb <= 8
        bits = getattr(index.rabitq, "nb_bits", 1)
        yield 1 <= bits <= 9
        if hasattr(index.rabitq, "compute_code_size"):
            yield index.code_size == index.rabitq.compute_code_size(index.d, bits)
    if kind is faiss.IndexLSH:
        turned = index.rrot.A.size() == index.rrot.d_in * index.rrot.d_out
        yield index.code_size == (index.nbits + 7) // 8
        yield not index.rotate_data or (turned and index.rrot.d_out == index.nbits)
        yield not index.train_thresholds or index.thresholds.size() == index.nbits
    if packed:
        yield from _agreeing_blocks(index)
    elif kind in IVF:
        yield index.invlists.code_size == index.code_size
    else:
        yield index.codes.size() == index.ntotal * index.code_size


def _agreeing_blocks(index: Index) -> Iterator[bool]:
    """Check codes that FAISS packs by blocks of rows."""
    yield index.bbs > 0 and index.bbs % 32 == 0 and index.nbits == 4
    yield index.M <= index.M2 <= index.M + 1
    if type(index) in IVF:
        lists = faiss.downcast_InvertedLists(index.invlists)
        yield (lists.n_per_block, lists.block_size) == (index.bbs, index.bbs * index.M2 // 2)
    elif index.ntotal:  # FAISS leaves the blocks' count as it was when rows are removed at once
        yield index.ntotal2 == -(-index.ntotal // max(1, index.bbs)) * index.bbs
        # A RaBitQ's blocks also hold what its distances are corrected by.
        width = 2 * index.code_size if type(index) in RABITQ else index.M2
        yield index.codes.size() >= index.ntotal2 * width // 2
    if hasattr(index, "pq"):
        yield (index.pq.M, index.pq.nbits) == (index.M, index.nbits)


def _refuse_unless(index: Index, sound: bool, part: str) -> None:
    if not sound:
        raise StoreError(
            f"{type(index).__name__}: its {part} does not fit its header; the file is damaged, "
            "restore it from a backup"
        )
