"""The kinds of FAISS index that are tried, and what is expected of each.

`tests/test_faiss_types.py` proves every cell on a few hundred rows; `faiss_types.py` measures it on
20,000 and writes the table in `docs/faiss.md`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import faiss
import numpy as np
from numpy.typing import NDArray

from simskip_vdb.connectors.faiss_lists import ivf_of

Index: TypeAlias = Any
Rows: TypeAlias = NDArray[np.float32]

IP, L2 = faiss.METRIC_INNER_PRODUCT, faiss.METRIC_L2


class Expect(str, Enum):
    """What simskip does with an index."""

    REFINES = "refines"
    NEEDS_ORIGINALS = "refines with --originals"
    REFUSES = "refuses"


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How large the tried indexes are; numbers that stand in braces in a factory string."""

    rows: int
    dim: int
    lists: int
    codes: int
    bits: int
    half: int


FULL = Size(rows=20_000, dim=128, lists=64, codes=16, bits=8, half=64)
SMALL = Size(rows=400, dim=16, lists=4, codes=4, bits=4, half=8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A kind of index.

    Attributes:
        name: What the table calls it.
        factory: FAISS's factory string, with the names of `Size` in braces.
        expect: What simskip does with it.
        reason: Part of the message where it refuses.
        edit: Changes the index after its rows were added, and returns the one to save.
        custom: Whether rows are given ids of their own, with holes.
        params: Search parameters as the application sets them.
    """

    name: str
    factory: str
    expect: Expect
    reason: str = ""
    metric: int = IP
    edit: Callable[[Index, Rows], Index] | None = None
    custom: bool = False
    params: Mapping[str, int] = field(default_factory=dict)

    def build(self, size: Size, rows: Rows) -> Index:
        """Make the index as an application does."""
        text = self.factory.format(**{name: getattr(size, name) for name in Size.__slots__})
        index = faiss.index_factory(size.dim, text, self.metric)
        be_quiet(index)
        index.train(rows)
        if self.custom:
            index.add_with_ids(rows, ids_of(self, len(rows)))
        else:
            index.add(rows)
        return index if self.edit is None else self.edit(index, rows)


def ids_of(cell: Cell, count: int) -> NDArray[np.int64]:
    """Return the ids that an application gives to the rows."""
    return np.arange(count) * (3 if cell.custom else 1)


def be_quiet(index: Index) -> None:
    """Keep FAISS from warning about few rows, which it prints past Python."""
    for name in ("cp", "pq"):
        part = getattr(index, name, None)
        if part is not None:
            getattr(part, "cp", part).min_points_per_centroid = 1
    for name in ("index", "base_index", "refine_index", "storage"):
        part = getattr(index, name, None)
        if isinstance(part, faiss.Index):
            be_quiet(faiss.downcast_index(part))


def _refined(name: str, factory: str, **more: Any) -> Cell:  # noqa: ANN401 fields of Cell
    return Cell(name=name, factory=factory, expect=Expect.REFINES, **more)


def _lossy(name: str, factory: str, **more: Any) -> Cell:  # noqa: ANN401 fields of Cell
    return Cell(name=name, factory=factory, expect=Expect.NEEDS_ORIGINALS, **more)


def _refused(name: str, factory: str, reason: str, **more: Any) -> Cell:  # noqa: ANN401 fields
    return Cell(name=name, factory=factory, expect=Expect.REFUSES, reason=reason, **more)


def _direct_map(kind: int) -> Callable[[Index, Rows], Index]:
    def edit(index: Index, rows: Rows) -> Index:
        index.set_direct_map_type(kind)
        return index

    return edit


def _remove(index: Index, rows: Rows) -> Index:
    index.remove_ids(np.arange(0, len(rows), 7) * 3)
    return index


def _on_disk(index: Index, rows: Rows) -> Index:
    return move_lists(index, str(Path(tempfile.mkdtemp(dir=_folder().name)) / "lists"))


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    """Return a folder that is gone when the process ends."""
    return tempfile.TemporaryDirectory(prefix="simskip-lists-")


def move_lists(index: Index, name: str) -> Index:
    """Move an index's lists to a file of their own, as FAISS's examples do."""
    ivf = ivf_of(index)
    lists = faiss.OnDiskInvertedLists(ivf.nlist, ivf.code_size, name)
    lists.merge_from_1(ivf.invlists)
    ivf.replace_invlists(lists, True)
    lists.this.disown()
    return index


def _repeat_ids(index: Index, rows: Rows) -> Index:
    index.add_with_ids(rows[:2], np.zeros(2, np.int64))
    return index


LISTS = {"nprobe": 4}
LINKS = {"efSearch": 64}
GRAPH = {"search_L": 64}
MORE = {"k_factor": 8}

CELLS = (
    _refined("Flat, inner product", "Flat"),
    _refined("Flat, L2", "Flat", metric=L2),
    _refined("HNSW Flat", "HNSW16,Flat", params=LINKS),
    _refined("HNSW SQ8", "HNSW16,SQ8", params=LINKS),
    _refined("NSG Flat", "NSG16,Flat", params=GRAPH),
    _refined("NSG SQ8", "NSG16,SQ8", params=GRAPH),
    _refined("SQfp16", "SQfp16"),
    _refined("SQbf16", "SQbf16"),
    _refined("SQ8", "SQ8"),
    _refined("IVF Flat", "IVF{lists},Flat", params=LISTS),
    _refined("IVF Flat, L2", "IVF{lists},Flat", params=LISTS, metric=L2),
    _refined("IVF Flat, HNSW quantiser", "IVF{lists}_HNSW8,Flat", params=LISTS),
    _refined("IVF SQ8", "IVF{lists},SQ8", params=LISTS),
    _refined("IVF SQfp16", "IVF{lists},SQfp16", params=LISTS),
    _refined("IVF Flat, custom ids", "IVF{lists},Flat", params=LISTS, custom=True),
    _refined(
        "IVF Flat, after removals", "IVF{lists},Flat", params=LISTS, custom=True, edit=_remove
    ),
    _refined(
        "IVF Flat, array map",
        "IVF{lists},Flat",
        params=LISTS,
        edit=_direct_map(faiss.DirectMap.Array),
    ),
    _refined(
        "IVF Flat, hashtable map",
        "IVF{lists},Flat",
        params=LISTS,
        custom=True,
        edit=_direct_map(faiss.DirectMap.Hashtable),
    ),
    _refined(
        "IVF Flat, lists on disk", "IVF{lists},Flat", params=LISTS, custom=True, edit=_on_disk
    ),
    _refined("IVF SQ8, lists on disk", "IVF{lists},SQ8", params=LISTS, edit=_on_disk),
    _refined(
        "IDMap over IVF Flat, lists on disk",
        "IDMap,IVF{lists},Flat",
        params=LISTS,
        custom=True,
        edit=_on_disk,
    ),
    _refined(
        "Refine(Flat) over IVF PQ, lists on disk",
        "IVF{lists},PQ{codes}x{bits},RFlat",
        params={**LISTS, **MORE},
        edit=_on_disk,
    ),
    _refined("IDMap over Flat", "IDMap,Flat", custom=True),
    _refined("IDMap over Flat, after removals", "IDMap,Flat", custom=True, edit=_remove),
    _refined("IDMap2 over HNSW Flat", "IDMap2,HNSW16,Flat", custom=True, params=LINKS),
    _refined("IDMap2 over IVF Flat", "IDMap2,IVF{lists},Flat", custom=True, params=LISTS),
    _refined("L2norm over Flat", "L2norm,Flat"),
    _refined("L2norm over IVF Flat", "L2norm,IVF{lists},Flat", params=LISTS),
    _refined("RR over Flat", "RR,Flat"),
    _refined("RR over IDMap over Flat", "RR,IDMap,Flat", custom=True),
    _refined("Refine(Flat) over Flat", "Flat,RFlat"),
    _refined("Refine(Flat) over PQ", "PQ{codes}x{bits},RFlat", params=MORE),
    _refined("Refine(Flat) over PQ fast scan", "PQ{codes}x4fs,RFlat", params=MORE),
    _refined(
        "Refine(Flat) over IVF PQ", "IVF{lists},PQ{codes}x{bits},RFlat", params={**LISTS, **MORE}
    ),
    _refined(
        "Refine(Flat) over IVF PQ fast scan",
        "IVF{lists},PQ{codes}x4fs,RFlat",
        params={**LISTS, **MORE},
    ),
    _refined("Refine(Flat) over PCA, Flat", "PCA{half},Flat,RFlat", params=MORE),
    _refined("Refine(Flat) over OPQ, PQ", "OPQ{codes},PQ{codes}x{bits},RFlat", params=MORE),
    _refined("Refine(SQ8) over Flat", "Flat,Refine(SQ8)"),
    _refined(
        "IDMap over Refine(Flat) over PQ", "IDMap,PQ{codes}x{bits},RFlat", custom=True, params=MORE
    ),
    _lossy("SQ6", "SQ6"),
    _lossy("SQ4", "SQ4"),
    _lossy("PQ", "PQ{codes}x{bits}"),
    _lossy("PQ fast scan", "PQ{codes}x4fs"),
    _lossy("HNSW PQ", "HNSW16,PQ{codes}x{bits}", params=LINKS),
    _lossy("NSG PQ", "NSG16,PQ{codes}x{bits}", params=GRAPH, metric=L2),
    _lossy("IVF PQ", "IVF{lists},PQ{codes}x{bits}", params=LISTS),
    _lossy("IVF PQ, L2", "IVF{lists},PQ{codes}x{bits}", params=LISTS, metric=L2),
    _lossy("IVF PQ, HNSW quantiser", "IVF{lists}_HNSW8,PQ{codes}x{bits}", params=LISTS),
    _lossy("IVF PQ fast scan", "IVF{lists},PQ{codes}x4fs", params=LISTS),
    _lossy("IVF PQ, lists on disk", "IVF{lists},PQ{codes}x{bits}", params=LISTS, edit=_on_disk),
    _lossy("IVF RQ, lists on disk", "IVF{lists},RQ{codes}x4", params=LISTS, edit=_on_disk),
    _lossy(
        "PCA over IVF Flat, lists on disk",
        "PCA{half},IVF{lists},Flat",
        params=LISTS,
        edit=_on_disk,
    ),
    _lossy("IVF SQ4", "IVF{lists},SQ4", params=LISTS),
    _lossy("RaBitQ", "RaBitQ"),
    _lossy("RaBitQ fast scan", "RaBitQfs"),
    _lossy("IVF RaBitQ", "IVF{lists},RaBitQ", params={"nprobe": 16}),
    _lossy("Residual quantiser", "RQ{codes}x4"),
    _lossy("Local search quantiser", "LSQ4x4"),
    _lossy("Product residual quantiser", "PRQ2x2x4"),
    _lossy("IVF residual quantiser", "IVF{lists},RQ{codes}x4", params=LISTS),
    _lossy("LSH", "LSH", metric=L2),
    _lossy("PCA over Flat", "PCA{half},Flat"),
    _lossy("Whitened PCA over Flat", "PCAW{codes},Flat"),
    _lossy("Rotated PCA over IVF Flat", "PCAR{half},IVF{lists},Flat", params=LISTS),
    _lossy("OPQ over PQ", "OPQ{codes},PQ{codes}x{bits}"),
    _lossy(
        "OPQ over IVF PQ fast scan",
        "OPQ{codes}_{half},IVF{lists},PQ{codes}x4fs",
        params=LISTS,
    ),
    _lossy("IDMap over PQ", "IDMap,PQ{codes}x{bits}", custom=True),
    _lossy("PCA over IDMap over Flat", "PCA{half},IDMap,Flat", custom=True),
    _lossy(
        "IDMap2 over PCA, IVF Flat",
        "IDMap2,PCA{half},IVF{lists},Flat",
        custom=True,
        params=LISTS,
    ),
    _refused(
        "Other metrics (L1, Lp, …)", "Flat", "neither inner product nor L2", metric=faiss.METRIC_L1
    ),
    _refused("SQ8 direct", "SQ8_direct", "whole numbers"),
    _refused("IVF, inverted multi-index", "IMI2x2,Flat", "coarse quantiser", metric=L2),
    _refused("ITQ over LSH", "ITQ{half},LSH", "cannot be undone", metric=L2),
    _refused("IVF PQ+PQ", "IVF{lists},PQ{codes}+{codes}", "cannot be rebuilt", metric=L2),
    _refused("IVF RaBitQ fast scan", "IVF{lists},RaBitQfs", "does not decode"),
    _refused("IVF Flat without duplicates", "IVF{lists},FlatDedup", "equal vectors once"),
    _refused(
        "IDMap over IVF, after removals",
        "IDMap,IVF{lists},Flat",
        "remove_ids",
        custom=True,
        edit=_remove,
    ),
    _refused(
        "Duplicate ids", "IVF{lists},Flat", "several rows each", custom=True, edit=_repeat_ids
    ),
)
