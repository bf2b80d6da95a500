"""What a FAISS index is made of: its parts, their types, names and settings.

FAISS decides by class what its Python objects can do, and subclasses behave differently from
their parents (an IDMap2 is an IDMap, a deduplicated IVF is an IVF), so types are compared exactly.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from enum import IntEnum
from typing import Any, NamedTuple, TypeAlias

import faiss
import numpy as np

from simskip_vdb.errors import UnsupportedIndexError

Index: TypeAlias = Any
"""An index of any of FAISS's classes, which have no common typed interface."""


class Fidelity(IntEnum):
    """How near what is read back is to what was written."""

    LOSSY = 0
    NEAR = 1
    EXACT = 2


def _types(*names: str) -> tuple[type, ...]:
    """Return FAISS's classes of these names, less those that an older version lacks."""
    return tuple(getattr(faiss, f"Index{name}") for name in names if hasattr(faiss, f"Index{name}"))


ID_MAPS = _types("IDMap", "IDMap2")
REFINES = _types("RefineFlat", "Refine")
FLAT = _types("Flat", "FlatL2", "FlatIP")
HNSW = _types("HNSWFlat", "HNSWSQ", "HNSWPQ")
NSG = _types("NSGFlat", "NSGSQ", "NSGPQ")
SCALAR = _types("ScalarQuantizer", "IVFScalarQuantizer")
PRODUCT = _types("PQ", "PQFastScan", "IVFPQ", "IVFPQFastScan")
ADDITIVE = _types(
    "ResidualQuantizer",
    "LocalSearchQuantizer",
    "ProductResidualQuantizer",
    "ProductLocalSearchQuantizer",
    "IVFResidualQuantizer",
    "IVFLocalSearchQuantizer",
    "IVFProductResidualQuantizer",
    "IVFProductLocalSearchQuantizer",
)
RABITQ = _types("RaBitQ", "RaBitQFastScan", "IVFRaBitQ")
IVF = (
    *_types("IVFFlat"),
    *(kind for kind in (*SCALAR, *PRODUCT, *ADDITIVE, *RABITQ) if issubclass(kind, faiss.IndexIVF)),
)
_LSH = _types("LSH")
_CODES = (*FLAT, *SCALAR, *PRODUCT, *ADDITIVE, *RABITQ, *_LSH, *IVF)

_SCALAR_CODES = {
    "fp16": Fidelity.NEAR,
    "bf16": Fidelity.NEAR,
    "8bit": Fidelity.NEAR,
    "8bit_uniform": Fidelity.NEAR,
    "6bit": Fidelity.LOSSY,
    "4bit": Fidelity.LOSSY,
    "4bit_uniform": Fidelity.LOSSY,
}
_SCALAR_NAMES = {
    getattr(faiss.ScalarQuantizer, f"QT_{name}"): name
    for name in (*_SCALAR_CODES, "8bit_direct", "8bit_direct_signed")
    if hasattr(faiss.ScalarQuantizer, f"QT_{name}")
}
_DIRECT_MAPS = {
    faiss.DirectMap.NoMap: "none",
    faiss.DirectMap.Array: "array",
    faiss.DirectMap.Hashtable: "hashtable",
}

_REFUSALS = (
    (
        r"IndexIVFRaBitQFastScan",
        "FAISS does not decode its codes rightly, so what was written could not be checked; "
        "use RaBitQ without fast scan ('IVF…,RaBitQ')",
    ),
    (
        r"IndexShards|IndexReplicas|IndexSplitVectors",
        "it is spread over several indexes; save each as a file and give them together, as "
        "'faiss:FOLDER/part*.faiss', or merge them into one (index.merge_from)",
    ),
    (r"Gpu", "it lives on a GPU; save it through faiss.index_gpu_to_cpu"),
    (
        r"IndexIVFFlatDedup",
        "it stores equal vectors once, and refined ones are no longer equal; use IVF Flat",
    ),
)
_UNKNOWN = (
    "it is of a type that cannot be rebuilt; use Flat, HNSW, NSG, IVF, SQ, PQ, residual, LSH or "
    "RaBitQ, or put them under Refine(Flat)"
)


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


def down(index: Index) -> Index:
    """Return a part as an object of its own class."""
    return faiss.downcast_index(index)


def inner(index: Index) -> Index | None:
    """Return what an IDMap or a chain of transforms wraps; None for anything else."""
    wraps = type(index) in (*ID_MAPS, faiss.IndexPreTransform)
    return down(index.index) if wraps else None


def wrappers(index: Index) -> Iterator[Index]:
    """Yield what wraps the core, from the outside in."""
    while (wrapped := inner(index)) is not None:
        yield index
        index = wrapped


def core(index: Index) -> Index:
    """Return the index under all wrappers, or the index itself."""
    while (wrapped := inner(index)) is not None:
        index = wrapped
    return index


def storage_of(index: Index) -> Index:
    """Return what holds a core's codes: a graph's storage, a Refine's second index, or itself."""
    if type(index) in (*HNSW, *NSG):
        return down(index.storage)
    if type(index) in REFINES:
        return down(index.refine_index)
    return index


def transforms(chain: Index) -> list[Any]:
    """Return the transforms of an IndexPreTransform in the order of use."""
    return [faiss.downcast_VectorTransform(chain.chain.at(i)) for i in range(chain.chain.size())]


def name(index: Index) -> str:
    """Name an index in the words of FAISS's factory.

    Raises:
        UnsupportedIndexError: It cannot be refined; the message says why.
    """
    kind = type(index)
    for kinds, describe in _NAMES:
        if kind in kinds:
            return describe(index)
    raise unsupported(index)


def fidelity(index: Index) -> Fidelity:
    """Tell how near what is read back is to what was written."""
    kind = type(index)
    if kind is faiss.IndexPreTransform:
        return min(fidelity(down(index.index)), *map(_transform_fidelity, transforms(index)))
    if kind in ID_MAPS:
        return fidelity(down(index.index))
    if kind in (*HNSW, *NSG, *REFINES):
        return fidelity(storage_of(index))
    if kind in SCALAR:
        return _SCALAR_CODES[scalar_code(index)]
    return Fidelity.EXACT if kind in (*FLAT, faiss.IndexIVFFlat) else Fidelity.LOSSY


def details(index: Index) -> dict[str, Any]:
    """Return parameters that are fixed when an index is built, by FAISS's names."""
    kind = type(index)
    if (wrapped := inner(index)) is not None:
        return details(wrapped)
    if kind in HNSW:
        own = {"M": links(index), "efConstruction": index.hnsw.efConstruction}
        return {**own, **details(storage_of(index))}
    if kind in NSG:
        return {"R": index.nsg.R, "GK": index.GK, **details(storage_of(index))}
    if kind in REFINES:
        return details(down(index.base_index))
    found: dict[str, Any] = {}
    if kind in IVF:
        found = {"nlist": index.nlist, "direct_map": _DIRECT_MAPS.get(index.direct_map.type)}
        if kind is not faiss.IndexIVFFlat:
            found["by_residual"] = bool(index.by_residual)
    if kind in PRODUCT:
        found |= {"pq_M": index.pq.M, "pq_nbits": index.pq.nbits}
    return found


def settings(index: Index, prefix: str = "") -> dict[str, Setting]:
    """Return search-time settings by name."""
    kind = type(index)
    if (wrapped := inner(index)) is not None:
        return settings(wrapped)
    if kind in HNSW:
        return {f"{prefix}efSearch": Setting(index.hnsw, "efSearch")}
    if kind in NSG:
        return {f"{prefix}search_L": Setting(index.nsg, "search_L")}
    if kind in IVF:
        coarse = settings(down(index.quantizer), "quantizer_")
        return {"nprobe": Setting(index, "nprobe"), **coarse}
    if kind in REFINES:
        return {"k_factor": Setting(index, "k_factor"), **settings(down(index.base_index))}
    return {}


def links(index: Index) -> int:
    """Return an HNSW's M."""
    return int(index.hnsw.nb_neighbors(1))


def scalar_code(index: Index) -> str:
    """Name a scalar quantiser's code.

    Raises:
        UnsupportedIndexError: It holds whole numbers only.
    """
    code = _SCALAR_NAMES.get(index.sq.qtype, f"code {index.sq.qtype}")
    if code not in _SCALAR_CODES:
        raise unsupported(
            index,
            f"its codes ({code}) hold whole numbers, and refined vectors are fractions; "
            "use SQ8 or SQfp16",
        )
    return code


def matrix_of(transform: Any) -> tuple[Any, Any]:  # noqa: ANN401 FAISS's transforms have no types
    """Return A (d_out, d_in) and b (d_out,) of a linear transform x → Ax + b, float64."""
    shape = (transform.d_out, transform.d_in)
    a = faiss.vector_to_array(transform.A).reshape(shape).astype(np.float64)
    b = faiss.vector_to_array(transform.b) if transform.have_bias else np.zeros(shape[0])
    return a, b.astype(np.float64)


def pseudo_inverse(a: Any) -> Any:  # noqa: ANN401 float64 arrays
    """Return the matrix that undoes `a` (d_out, d_in) as far as it can be undone."""
    # A rotation's is its transpose; a decomposition takes a minute at d = 4096.
    is_rotation = np.allclose(a @ a.T, np.eye(len(a)), atol=1e-4)
    return a.T if is_rotation else np.linalg.pinv(a)


def is_linear(transform: object) -> bool:
    """Tell transforms of the form x → Ax + b."""
    return isinstance(transform, faiss.LinearTransform)


def unsupported(index: Index, why: str | None = None) -> UnsupportedIndexError:
    """Return the error for a part that cannot be refined."""
    kind = type(index).__name__
    if why is None:
        reasons = (text for pattern, text in _REFUSALS if re.match(pattern, kind))
        why = next(reasons, _UNKNOWN)
    return UnsupportedIndexError(f"{kind} cannot be refined: {why}")


def _name_ivf(index: Index) -> str:
    quantizer = down(index.quantizer)
    if type(quantizer) in FLAT:
        coarse = f"IVF{index.nlist}"
    elif type(quantizer) is faiss.IndexHNSWFlat:
        coarse = f"IVF{index.nlist}_HNSW{links(quantizer)}"
    else:
        raise unsupported(
            index,
            f"its coarse quantiser, {type(quantizer).__name__}, is neither Flat nor HNSW Flat; "
            "build it as 'IVF…' or 'IVF…_HNSW…'",
        )
    lists = faiss.downcast_InvertedLists(index.invlists)
    where = " on disk" if type(lists) is faiss.OnDiskInvertedLists else ""
    return f"{coarse} {_name_codes(index)}{where}"


def _name_codes(index: Index) -> str:
    kind = type(index)
    if kind in SCALAR:
        return f"SQ {scalar_code(index)}"
    if kind in PRODUCT:
        return f"PQ{index.pq.M}x{index.pq.nbits}{'fs' if 'FastScan' in kind.__name__ else ''}"
    if kind in RABITQ:
        return f"RaBitQ{'fs' if 'FastScan' in kind.__name__ else ''}"
    if kind in ADDITIVE:
        return kind.__name__.removeprefix("Index").removeprefix("IVF").removesuffix("Quantizer")
    return f"LSH{index.nbits}" if kind in _LSH else "Flat"


def _name_transforms(index: Index) -> str:
    return ", ".join([*map(_name_transform, transforms(index)), name(down(index.index))])


def _name_transform(transform: Any) -> str:  # noqa: ANN401 FAISS's transforms have no types
    kind = type(transform)
    if kind not in _TRANSFORMS:
        raise UnsupportedIndexError(
            f"IndexPreTransform cannot be refined: its transform, {kind.__name__}, cannot be "
            f"undone to read rows back; transform the vectors before indexing instead"
        )
    width = "" if transform.d_out == transform.d_in else str(transform.d_out)
    return f"{_TRANSFORMS[kind]}{width}"


def _transform_fidelity(transform: Any) -> Fidelity:  # noqa: ANN401 FAISS's transforms have no types
    if transform.d_out < transform.d_in:
        return Fidelity.LOSSY
    if not is_linear(transform):
        return Fidelity.NEAR
    a, _ = matrix_of(transform)
    undone = pseudo_inverse(a) @ a
    return Fidelity.NEAR if np.allclose(undone, np.eye(len(undone)), atol=1e-3) else Fidelity.LOSSY


_TRANSFORMS: Mapping[type, str] = {
    faiss.PCAMatrix: "PCA",
    faiss.RandomRotationMatrix: "RR",
    faiss.OPQMatrix: "OPQ",
    faiss.LinearTransform: "Linear",
    faiss.NormalizationTransform: "L2norm",
    faiss.CenteringTransform: "Center",
    faiss.RemapDimensionsTransform: "Remap",
}
_NAMES: tuple[tuple[tuple[type, ...], Callable[[Index], str]], ...] = (
    (ID_MAPS, lambda i: f"{type(i).__name__.removeprefix('Index')} over {name(down(i.index))}"),
    ((faiss.IndexPreTransform,), _name_transforms),
    (REFINES, lambda i: f"{name(down(i.base_index))}, Refine({name(storage_of(i))})"),
    (HNSW, lambda i: f"HNSW{links(i)} {name(storage_of(i))}"),
    (NSG, lambda i: f"NSG{i.nsg.R} {name(storage_of(i))}"),
    (IVF, _name_ivf),
    (_CODES, _name_codes),
)
