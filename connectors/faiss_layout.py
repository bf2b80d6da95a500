"""What a FAISS index is made of: which types can be refined, where their rows are, their settings.

FAISS decides by class what its Python objects can do, and subclasses behave differently from
their parents (an IDMap2 is an IDMap, a deduplicated IVF is an IVF), so types are compared exactly.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import faiss
import numpy as np
from numpy.typing import NDArray

from simskip_vdb.datatypes import Metric, Positions, Vectors
from simskip_vdb.errors import ConfigError, UnsupportedIndexError

Index: TypeAlias = Any
"""An index of any of FAISS's classes, which have no common typed interface."""

FLAT = (faiss.IndexFlat, faiss.IndexFlatL2, faiss.IndexFlatIP)
ID_MAPS = (faiss.IndexIDMap, faiss.IndexIDMap2)
IVF = (faiss.IndexIVFFlat, faiss.IndexIVFPQ, faiss.IndexIVFScalarQuantizer)
CODEBOOKS = (faiss.IndexPQ, faiss.IndexIVFPQ)

_METRICS = {faiss.METRIC_INNER_PRODUCT: Metric.DOT, faiss.METRIC_L2: Metric.EUCLID}
_CODES = {
    faiss.ScalarQuantizer.QT_fp16: "fp16",
    faiss.ScalarQuantizer.QT_bf16: "bf16",
    faiss.ScalarQuantizer.QT_8bit: "8bit",
}
_DIRECT_MAPS = {
    faiss.DirectMap.NoMap: "none",
    faiss.DirectMap.Array: "array",
    faiss.DirectMap.Hashtable: "hashtable",
}
_ALIASES = {"hnsw_ef": "efSearch", "k_factor_rf": "k_factor"}

_REFUSALS = (
    (
        r"Index(IVF)?(PQ|ScalarQ|.*Residual|.*LocalSearch|.*Additive|RaBitQ|EDEN|.*SpectralHash)"
        r"|IndexHNSW(PQ|SQ|2Level|RaBitQ)|IndexNSG(PQ|SQ)|IndexLSH|IndexLattice|Index2Layer"
        r"|IndexQINCo|IndexNeuralNet|IndexRowwise|.*FastScan",
        "it stores lossy codes, and refining decoded codes would lose twice; "
        "keep exact vectors beside the codes (add ',Refine(Flat)' to the factory string) "
        "or use Flat, HNSW Flat, IVF Flat, SQfp16 or SQ8",
    ),
    (
        r"IndexPreTransform",
        "it stores transformed vectors, whose originals cannot be read back; "
        "transform the vectors before indexing instead",
    ),
    (
        r"IndexShards|IndexReplicas|IndexSplitVectors",
        "it is spread over several indexes; refine each of them, or merge them into one",
    ),
    (
        r"Gpu",
        "it lives on a GPU; save it through faiss.index_gpu_to_cpu",
    ),
)
_UNKNOWN = "it is of a type that cannot be rebuilt; use Flat, HNSW Flat or IVF Flat"


class Setting(NamedTuple):
    """A search-time setting: an attribute of a part of the index."""

    owner: Any
    attribute: str

    @property
    def value(self) -> int | float:
        """What the index has now."""
        number: int | float = getattr(self.owner, self.attribute)
        return number

    def set(self, value: int | float) -> None:
        """Change it in the index."""
        setattr(self.owner, self.attribute, value)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Layout:
    """An index taken apart.

    Attributes:
        root: The index; it owns everything below, so it must live as long.
        uri: Address, for messages.
        ids: Of the rows in scan order, shape (n,), int64: in the order of an id map; by
            ascending id in an IVF, which survives a rebuild that moves rows to other lists.
        take: Reads the rows at some positions of the scan order, (b,) → (b, d).
        settings: Search-time settings by name.
        details: Other parameters by FAISS's names.
    """

    root: Index
    uri: str
    ids: NDArray[np.int64]
    take: Callable[[Positions], Vectors]
    kind: str
    metric: Metric
    positional: bool
    exact: bool
    settings: Mapping[str, Setting]
    details: Mapping[str, Any]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def dim(self) -> int:
        """Dimension of a vector."""
        return int(self.root.d)

    def read(self, start: int, stop: int) -> Vectors:
        """Return the rows from ``start`` to ``stop`` in scan order, shape (stop - start, d)."""
        return self.take(np.arange(start, stop))

    @contextmanager
    def using(self, params: Mapping[str, Any]) -> Iterator[None]:
        """Apply search-time settings inside the block.

        Raises:
            ConfigError: The index does not know a setting, or the value makes no sense.
        """
        chosen = {name: self._setting(name, value) for name, value in params.items()}
        before = {name: setting.value for name, setting in chosen.items()}
        try:
            for name, setting in chosen.items():
                setting.set(params[name])
            yield
        finally:
            for name, setting in chosen.items():
                setting.set(before[name])

    def _setting(self, name: str, value: object) -> Setting:
        setting = self.settings.get(_ALIASES.get(name, name))
        if setting is None:
            known = ", ".join(self.settings) or "none"
            raise ConfigError(
                f"{self.uri}: {self.kind} has no search parameter '{name}'; it has: {known}"
            )
        types = int if isinstance(setting.value, int) else (int, float)
        whole = isinstance(value, types) and not isinstance(value, bool)
        if not whole or not 1 <= value < math.inf:  # type: ignore[operator]
            raise ConfigError(f"{self.uri}: {name} is a number from 1, not {value!r}")
        return setting


def take_apart(root: Index, uri: str) -> Layout:
    """Find the rows of an index that was read for reading only.

    Args:
        root: What ``faiss.read_index`` returned. An IVF's direct map is replaced by one that
            leads from scan order to the lists, so this index must never be written.
        uri: Address, for messages.

    Raises:
        UnsupportedIndexError: The index cannot be refined; the message says why.
    """
    try:
        return _take_apart(root, uri)
    except UnsupportedIndexError as error:
        raise UnsupportedIndexError(f"{uri}: {error}") from None


def body_of(root: Index) -> Index:
    """Return the index under an IDMap, or the index itself."""
    return faiss.downcast_index(root.index) if type(root) in ID_MAPS else root


def base_of(body: Index) -> Index:
    """Return the index that a Refine searches first, or the index itself."""
    is_refine = type(body) is faiss.IndexRefineFlat
    return faiss.downcast_index(body.base_index) if is_refine else body


def is_trained_on_rows(base: Index) -> bool:
    """Say whether the index learns something from its rows: centroids, ranges or codebooks."""
    if type(base) is faiss.IndexScalarQuantizer:
        return bool(base.sq.qtype == faiss.ScalarQuantizer.QT_8bit)
    return type(base) not in (*FLAT, faiss.IndexHNSWFlat)


def _take_apart(root: Index, uri: str) -> Layout:
    body = body_of(root)
    metric = _METRICS.get(root.metric_type)
    if metric is None:
        raise _unsupported(root, "its metric is neither inner product nor L2")
    kind, details, settings = _name(body), _details(body), _settings(body)
    storage, ids = _storage(body)
    if not np.array_equal(ids, np.arange(len(ids))):
        kind += ", custom ids"
    if body is not root:
        ids = _mapped_ids(root, ids)
        kind = f"{type(root).__name__.removeprefix('Index')} over {kind}"
    return Layout(
        root=root,
        uri=uri,
        ids=ids,
        take=storage.reconstruct_batch,
        kind=kind,
        metric=metric,
        positional=type(root) not in (*ID_MAPS, *IVF),
        exact=type(storage) is not faiss.IndexScalarQuantizer,
        settings=settings,
        details={**details, **{name: setting.value for name, setting in settings.items()}},
    )


def _mapped_ids(root: Index, inner_ids: NDArray[np.int64]) -> NDArray[np.int64]:
    ids: NDArray[np.int64] = faiss.vector_to_array(root.id_map)
    if len(ids) != root.ntotal:
        raise _unsupported(root, f"it maps {len(ids)} ids to {root.ntotal} rows")
    if not np.array_equal(inner_ids, np.arange(len(ids))):
        raise _unsupported(
            root,
            "its rows are not numbered 0 to n-1 inside (FAISS answers with wrong ids after "
            "remove_ids on an IDMap over an IVF, and drops rows that are not finite); "
            "build it again without the IDMap, since an IVF keeps ids itself",
        )
    return ids


def _storage(body: Index) -> tuple[Index, NDArray[np.int64]]:
    """Return what holds the vectors, addressed by scan order, and the ids in that order."""
    if type(body) is faiss.IndexIVFFlat:
        return body, _order_lists(body)
    storage = body
    if type(body) is faiss.IndexHNSWFlat:
        storage = faiss.downcast_index(body.storage)
    elif type(body) is faiss.IndexRefineFlat:
        _check_base(body)
        storage = faiss.downcast_index(body.refine_index)
    if storage is not body and type(storage) not in FLAT:
        raise _unsupported(body, f"its vectors are in an {type(storage).__name__}, not in a Flat")
    if storage.ntotal != body.ntotal or storage.d != body.d:
        raise _unsupported(body, f"it stores {storage.ntotal} of its {body.ntotal} vectors")
    return storage, np.arange(body.ntotal)


def _order_lists(ivf: Index) -> NDArray[np.int64]:
    """Point the direct map from ascending ids to the lists, and return these ids."""
    ids, places = _list_entries(ivf)
    order = np.argsort(ids, kind="stable")
    ivf.direct_map.type = faiss.DirectMap.Array
    faiss.copy_array_to_vector(places[order], ivf.direct_map.array)
    return ids[order]


def _list_entries(ivf: Index) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the ids in the inverted lists and FAISS's address (list << 32 | offset) of each."""
    lists = faiss.downcast_InvertedLists(ivf.invlists)
    if type(lists) is not faiss.ArrayInvertedLists:
        raise _unsupported(
            ivf, "its inverted lists are kept in another file; save it with lists in memory"
        )
    sizes = np.array([lists.list_size(i) for i in range(ivf.nlist)], np.int64)
    ids = np.concatenate(
        [
            faiss.rev_swig_ptr(lists.get_ids(i), int(size)) if size else np.empty(0, np.int64)
            for i, size in enumerate(sizes)
        ]
    )
    if len(ids) > ivf.ntotal:
        raise _unsupported(ivf, f"its lists hold {len(ids)} rows, but it counts {ivf.ntotal}")
    starts = np.repeat(np.cumsum(sizes) - sizes, sizes)
    offsets = np.arange(len(ids)) - starts
    return ids, (np.repeat(np.arange(ivf.nlist), sizes) << 32) | offsets


def _check_base(refine: Index) -> None:
    """Refuse a base index that cannot be rebuilt, or that numbers rows otherwise."""
    base = base_of(refine)
    if base.ntotal != refine.ntotal:
        raise _unsupported(refine, f"its base has {base.ntotal} of its {refine.ntotal} rows")
    if type(base) in IVF:
        ids, _ = _list_entries(base)
        if len(ids) and not 0 <= ids.min() <= ids.max() < refine.ntotal:
            raise _unsupported(refine, "ids in its base are not positions of its vectors")


def _name(index: Index) -> str:
    """Name an index that is refined, or that serves as the base of a Refine."""
    kind = type(index)
    if kind in FLAT:
        return "Flat"
    if kind is faiss.IndexHNSWFlat:
        return f"HNSW{_links(index)} Flat"
    if kind is faiss.IndexScalarQuantizer:
        return f"SQ {_code(index)}"
    if kind is faiss.IndexIVFFlat:
        return f"{_coarse(index)} Flat"
    if kind is faiss.IndexRefineFlat:
        return f"{_base_name(base_of(index))}, Refine(Flat)"
    raise _unsupported(index)


def _base_name(base: Index) -> str:
    if type(base) is faiss.IndexPQ:
        return f"PQ{base.pq.M}x{base.pq.nbits}"
    if type(base) is faiss.IndexIVFPQ:
        return f"{_coarse(base)} PQ{base.pq.M}x{base.pq.nbits}"
    if type(base) is faiss.IndexIVFScalarQuantizer:
        return f"{_coarse(base)} SQ {_code(base)}"
    if type(base) in (*FLAT, faiss.IndexHNSWFlat, faiss.IndexIVFFlat, faiss.IndexScalarQuantizer):
        return _name(base)
    raise _unsupported(
        base,
        "an index under Refine must be known how to rebuild; "
        "these are: Flat, HNSW Flat, SQ, PQ, IVF Flat, IVFPQ, IVFSQ",
    )


def _code(index: Index) -> str:
    code = _CODES.get(index.sq.qtype)
    if code is None:
        raise _unsupported(index, "its codes are too coarse to refine; use SQfp16, SQbf16 or SQ8")
    return code


def _coarse(ivf: Index) -> str:
    quantizer = faiss.downcast_index(ivf.quantizer)
    if type(quantizer) in FLAT:
        return f"IVF{ivf.nlist}"
    if type(quantizer) is faiss.IndexHNSWFlat:
        return f"IVF{ivf.nlist}_HNSW{_links(quantizer)}"
    raise _unsupported(
        ivf, f"its coarse quantiser, {type(quantizer).__name__}, is neither Flat nor HNSW Flat"
    )


def _links(index: Index) -> int:
    return int(index.hnsw.nb_neighbors(1))


def _details(index: Index) -> dict[str, Any]:
    kind = type(index)
    if kind is faiss.IndexHNSWFlat:
        return {"M": _links(index), "efConstruction": index.hnsw.efConstruction}
    if kind in IVF:
        return {"nlist": index.nlist, "direct_map": _DIRECT_MAPS[index.direct_map.type]}
    if kind is faiss.IndexRefineFlat:
        return _details(base_of(index))
    return {}


def _settings(index: Index, prefix: str = "") -> dict[str, Setting]:
    kind = type(index)
    if kind is faiss.IndexHNSWFlat:
        return {f"{prefix}efSearch": Setting(index.hnsw, "efSearch")}
    if kind in IVF:
        coarse = _settings(faiss.downcast_index(index.quantizer), "quantizer_")
        return {"nprobe": Setting(index, "nprobe"), **coarse}
    if kind is faiss.IndexRefineFlat:
        return {"k_factor": Setting(index, "k_factor"), **_settings(base_of(index))}
    return {}


def _unsupported(index: Index, why: str | None = None) -> UnsupportedIndexError:
    name = type(index).__name__
    if why is None:
        reasons = (text for pattern, text in _REFUSALS if re.match(pattern, name))
        why = next(reasons, _UNKNOWN)
    return UnsupportedIndexError(f"{name} cannot be refined: {why}")
