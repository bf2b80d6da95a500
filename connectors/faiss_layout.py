"""An index taken apart: where its rows are, in which order, and how they are read back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import faiss
import numpy as np
from numpy.typing import NDArray

from simskip_vdb.connectors.faiss_sound import check_codes, check_lists, check_search
from simskip_vdb.connectors.faiss_tree import (
    FLAT,
    ID_MAPS,
    IVF,
    PRODUCT,
    REFINES,
    Fidelity,
    Index,
    Setting,
    core,
    details,
    down,
    fidelity,
    is_linear,
    matrix_of,
    name,
    pseudo_inverse,
    settings,
    storage_of,
    transforms,
    unsupported,
    wrappers,
)
from simskip_vdb.datatypes import Metric, Positions, Vectors
from simskip_vdb.errors import ConfigError, StoreError

Take = Callable[[Positions], Vectors]

_METRICS = {faiss.METRIC_INNER_PRODUCT: Metric.DOT, faiss.METRIC_L2: Metric.EUCLID}
_LISTS = (faiss.ArrayInvertedLists, faiss.BlockInvertedLists, faiss.OnDiskInvertedLists)
_ALIASES = {"hnsw_ef": "efSearch", "k_factor_rf": "k_factor"}


class _Rows(NamedTuple):
    """Rows of a part: their labels in scan order, shape (n,), and a reader by position."""

    ids: NDArray[np.int64]
    take: Take


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Layout:
    """An index taken apart.

    Attributes:
        root: The index; it owns everything below, so it must live as long.
        uri: Address, for messages.
        ids: Of the rows in scan order, shape (n,), int64: in the order of an id map; by
            ascending id in an IVF, which survives a rebuild that moves rows to other lists.
        take: Reads the rows at some positions of the scan order, (b,) → (b, d).
        positional: Whether ids are positions.
        in_order: Whether the scan order is that in which rows were added.
        settings: Search-time settings by name.
        details: Other parameters by FAISS's names.
    """

    root: Index
    uri: str
    ids: NDArray[np.int64]
    take: Take
    kind: str
    metric: Metric
    positional: bool
    in_order: bool
    fidelity: Fidelity
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
        if not whole or not 1 <= value < 2**31:  # type: ignore[operator]
            raise ConfigError(f"{self.uri}: {name} is a number from 1 to 2**31 - 1, not {value!r}")
        if setting.attribute == "search_L" and value > len(self):  # type: ignore[operator]
            raise ConfigError(f"{self.uri}: {name} is at most the number of rows, not {value!r}")
        return setting


def take_apart(root: Index, uri: str) -> Layout:
    """Find the rows of an index that was read for reading only.

    Args:
        root: What ``faiss.read_index`` returned. An IVF's direct map is replaced by one that
            leads from scan order to the lists, so this index must never be written.
        uri: Address, for messages.

    Raises:
        UnsupportedIndexError: The index cannot be refined; the message says why.
        StoreError: Its numbers do not fit together.
    """
    try:
        return _take_apart(root, uri)
    except StoreError as error:
        raise type(error)(f"{uri}: {error}") from None


def _take_apart(root: Index, uri: str) -> Layout:
    metric = _METRICS.get(root.metric_type)
    if metric is None:
        raise unsupported(
            root,
            f"its metric ({root.metric_type}) is neither inner product nor L2, which exact search "
            "and fitting go by; build it with METRIC_INNER_PRODUCT or METRIC_L2",
        )
    kind = name(root)
    known, parameters = settings(root), details(root)
    mapped = any(type(part) in ID_MAPS for part in wrappers(root))
    rows = _rows(root)
    if not mapped and not np.array_equal(rows.ids, np.arange(len(rows.ids))):
        kind += ", custom ids"
    return Layout(
        root=root,
        uri=uri,
        ids=rows.ids,
        take=rows.take,
        kind=kind,
        metric=metric,
        positional=not mapped and type(core(root)) not in IVF,
        in_order=mapped or type(core(root)) not in IVF or not kind.endswith("custom ids"),
        fidelity=fidelity(root),
        settings=known,
        details={**parameters, **{key: setting.value for key, setting in known.items()}},
    )


def _rows(index: Index) -> _Rows:
    kind = type(index)
    if kind in ID_MAPS:
        rows = _rows(down(index.index))
        return _Rows(_mapped_ids(index, rows.ids), rows.take)
    if kind is faiss.IndexPreTransform:
        rows = _rows(down(index.index))
        return _Rows(rows.ids, _undoing(index, rows.take))
    if kind in IVF:
        return _lists(index)
    if kind in REFINES:
        _check_base(index)
    storage = storage_of(index)
    if kind is faiss.IndexHNSWFlat and type(storage) not in FLAT:
        raise unsupported(index, f"its vectors are in an {type(storage).__name__}, not in a Flat")
    if storage.ntotal != index.ntotal or storage.d != index.d:
        raise unsupported(index, f"it stores {storage.ntotal} of its {index.ntotal} vectors")
    check_codes(storage)
    check_search(index)
    return _Rows(np.arange(index.ntotal), storage.reconstruct_batch)


def _mapped_ids(root: Index, inner_ids: NDArray[np.int64]) -> NDArray[np.int64]:
    ids: NDArray[np.int64] = faiss.vector_to_array(root.id_map)
    if len(ids) != root.ntotal:
        raise unsupported(root, f"it maps {len(ids)} ids to {root.ntotal} rows")
    if not np.array_equal(inner_ids, np.arange(len(ids))):
        raise unsupported(
            root,
            "its rows are not numbered 0 to n-1 inside (FAISS answers with wrong ids after "
            "remove_ids on an IDMap over an IVF, and drops rows that are not finite); "
            "build it again without the IDMap, since an IVF keeps ids itself",
        )
    return ids


def _lists(ivf: Index) -> _Rows:
    """Point the direct map from ascending ids to the lists, and return these ids."""
    check_lists(ivf)
    ids, places = _list_entries(ivf)
    order = np.argsort(ids, kind="stable")
    ivf.direct_map.type = faiss.DirectMap.Array
    faiss.copy_array_to_vector(places[order], ivf.direct_map.array)
    if type(ivf) in PRODUCT and getattr(ivf, "fine_quantizer", ivf) is None:
        ivf.fine_quantizer = ivf.pq  # FAISS 1.15 forgets it on reading, and decodes through it
    return _Rows(ids[order], ivf.reconstruct_batch)


def _list_entries(ivf: Index) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the ids in the inverted lists and FAISS's address (list << 32 | offset) of each."""
    lists = faiss.downcast_InvertedLists(ivf.invlists)
    if type(lists) not in _LISTS:
        raise unsupported(ivf, f"its inverted lists, {type(lists).__name__}, cannot be saved again")
    sizes = np.array([lists.list_size(i) for i in range(ivf.nlist)], np.int64)
    ids = np.concatenate(
        [
            faiss.rev_swig_ptr(lists.get_ids(i), int(size)) if size else np.empty(0, np.int64)
            for i, size in enumerate(sizes)
        ]
    )
    if len(ids) > ivf.ntotal:
        raise unsupported(ivf, f"its lists hold {len(ids)} rows, but it counts {ivf.ntotal}")
    starts = np.repeat(np.cumsum(sizes) - sizes, sizes)
    offsets = np.arange(len(ids)) - starts
    return ids, (np.repeat(np.arange(ivf.nlist), sizes) << 32) | offsets


def _check_base(refine: Index) -> None:
    """Refuse a base index that numbers rows otherwise than its Refine."""
    base = down(refine.base_index)
    if base.ntotal != refine.ntotal:
        raise unsupported(refine, f"its base has {base.ntotal} of its {refine.ntotal} rows")
    if any(type(part) in ID_MAPS for part in wrappers(base)):
        raise unsupported(refine, "an IDMap under a Refine takes no rows; put it on the outside")
    ids, _ = _rows(core(base))
    if len(ids) and not 0 <= ids.min() <= ids.max() < refine.ntotal:
        raise unsupported(refine, "ids in its base are not positions of its vectors")


def _undoing(chain: Index, take: Take) -> Take:
    """Read rows through a chain of transforms backwards."""
    undo = [_inverse(transform) for transform in reversed(transforms(chain))]

    def read(positions: Positions) -> Vectors:
        vectors = take(positions)
        for step in undo:
            vectors = step(vectors)
        return np.ascontiguousarray(vectors, np.float32)

    return read


def _inverse(transform: Any) -> Callable[[Vectors], Vectors]:  # noqa: ANN401 untyped
    """Return what undoes a transform as far as it can be undone; directions stay directions."""
    if is_linear(transform):
        a, b = matrix_of(transform)
        back = pseudo_inverse(a)
        return lambda y: np.asarray((y - b) @ back.T, np.float32)
    if type(transform) is faiss.CenteringTransform:
        mean = faiss.vector_to_array(transform.mean)
        return lambda y: y + mean
    if type(transform) is faiss.RemapDimensionsTransform:
        source = faiss.vector_to_array(transform.map)
        return lambda y: _scatter(y, source, transform.d_in)
    return lambda y: y


def _scatter(y: Vectors, source: NDArray[np.int32], width: int) -> Vectors:
    x = np.zeros((len(y), width), np.float32)
    x[:, source[source >= 0]] = y[:, source >= 0]
    return x
