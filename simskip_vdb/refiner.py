"""The refiner: moves stored vectors, in numpy alone.

refined(x, row) = ‖x‖ · normalise(µ + ρ · normalise(c + alpha·f(c) + beta·offset[row])),
with x̂ = x / ‖x‖, ρ = ‖x̂ - µ‖ and c = (x̂ - µ) / ρ.

The skip connection is SimSkip's (Liu, Kim and Bansal, arXiv:2404.08701). Norms are kept, so an
index that compares by dot product or Euclidean distance keeps its meaning. µ is the mean direction
of the rows: most encoders crowd theirs around one (Ethayarajh, arXiv:1909.00512; Mu & Viswanath,
arXiv:1702.01417), and what tells rows apart is how they lie about it. A row moves on the sphere
around µ that it lies on, and so keeps comparing with raw rows as it did.
"""

from __future__ import annotations

import hashlib
import json
import math
import shlex
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import SafetensorError

from simskip_vdb.datatypes import Ids, Metric, Side, Vectors
from simskip_vdb.durable import json_of, write_durably
from simskip_vdb.errors import ConfigError, DataError
from simskip_vdb.moving import Formula, Layer
from simskip_vdb.state_place import marker_of
from simskip_vdb.store import VectorStore

if TYPE_CHECKING:
    from simskip_vdb.moving_on_device import OnDevice

SCHEMA = 2
READ = (1, SCHEMA)  # the first had no origin
WEIGHTS_FILE = "refiner.safetensors"
SETTINGS_FILE = "refiner.json"


class LateRule(str, Enum):
    """What happens to rows that arrived after the fit."""

    RAW = "raw"
    F = "f"


def _no_ids() -> Ids:
    return np.empty(0, dtype=np.int64)


def _no_origin() -> Vectors:
    return np.empty(0, dtype=np.float32)


def _no_digests() -> NDArray[np.uint64]:
    return np.empty(0, dtype=np.uint64)


def _no_offsets() -> Vectors:
    return np.empty((0, 0), dtype=np.float32)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Refiner:
    """A fitted refiner.

    Attributes:
        dim: Dimension d of the vectors it takes.
        side: What moves: stored rows, queries or both.
        metric: Metric of the index it was fitted for.
        alpha: Weight of f, at least 0.
        beta: Weight of the offsets, at least 0.
        origin: µ, shape (d,), float32; empty for zero.
        layers: The three linear layers of f, BatchNorm folded in; empty where f is not used.
        offset_ids: Shape (m,), ascending; integers or text.
        offsets: Shape (m, d), float32.
        late: What happens to rows that arrived after the fit.
        fitted_on: Digests (`rows.row_digests`) of the query vectors and rows that it learnt from,
            ascending, uint64; these prove nothing about it.
        chosen_on: Digests of the query vectors that it was chosen by.
        info: Where it comes from (seed, signal, versions); changes nothing that it computes.
        id: First 12 hex digits of a hash of everything that changes what it computes.

    Raises:
        DataError: Shapes do not fit together, numbers are not finite, or ids are not ascending.
    """

    dim: int
    side: Side
    metric: Metric
    alpha: float = 0.0
    beta: float = 0.0
    origin: Vectors = field(default_factory=_no_origin)
    layers: tuple[Layer, ...] = ()
    offset_ids: Ids = field(default_factory=_no_ids)
    offsets: Vectors = field(default_factory=_no_offsets)
    late: LateRule = LateRule.RAW
    fitted_on: NDArray[np.uint64] = field(default_factory=_no_digests)
    chosen_on: NDArray[np.uint64] = field(default_factory=_no_digests)
    info: Mapping[str, Any] = field(default_factory=dict)
    id: str = field(init=False)
    _formula: Formula | OnDevice = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not len(self.offset_ids):
            object.__setattr__(self, "offsets", np.empty((0, self.dim), dtype=np.float32))
        _check(self)
        object.__setattr__(self, "id", _digest(self))
        object.__setattr__(self, "_formula", self._made())

    @classmethod
    def identity(
        cls, dim: int, *, side: Side = Side.DOCS, metric: Metric = Metric.COSINE
    ) -> Refiner:
        """Return the refiner that returns its input."""
        return cls(dim=dim, side=side, metric=metric)

    @property
    def is_identity(self) -> bool:
        """Whether every vector is returned bit for bit."""
        uses_f = self.alpha != 0 and bool(self.layers)
        return not uses_f and (self.beta == 0 or not len(self.offset_ids))

    @property
    def moves_queries(self) -> bool:
        """Whether queries are refined."""
        return self.side is not Side.DOCS and self.alpha != 0 and bool(self.layers)

    @property
    def moves_rows(self) -> bool:
        """Whether stored rows are refined."""
        return self.side is not Side.QUERIES and not self.is_identity

    def f(self, vectors: NDArray[Any]) -> Vectors | None:
        """Return f of rows, for refiners of the same layers to share; None if there is none.

        Args:
            vectors: Shape (n, d), any float dtype.

        Returns:
            Shape (n, d), float32.

        Raises:
            DataError: The dimension is not the refiner's.
        """
        x = self._checked(vectors)
        return self._formula.f(x) if self.moves_rows and self.alpha and self.layers else None

    def on(self, device: str) -> Refiner:
        """Return the same refiner, computing on a device of torch.

        Last digits differ from what the CPU computes.

        Args:
            device: Such as ``cuda``.
        """
        from simskip_vdb.moving_on_device import OnDevice

        placed = copy(self)
        object.__setattr__(placed, "_formula", OnDevice(self._made(), device))
        return placed

    def refine_rows(
        self,
        vectors: NDArray[Any],
        ids: Ids,
        late: NDArray[np.bool_] | None = None,
        f: Vectors | None = None,
    ) -> Vectors:
        """Refine stored rows.

        Rows that are zero or not finite are returned as they are, and so are late rows unless the
        late rule is F; no late row gets an offset.

        Args:
            vectors: Original vectors, shape (n, d), any float dtype.
            ids: Row ids, shape (n,).
            late: Shape (n,), true for rows that arrived after the fit; None for none.
            f: What `f` returned for these rows; None to compute it.

        Returns:
            Shape (n, d), float32; the input itself where nothing moves.

        Raises:
            DataError: The dimension is not the refiner's, or the ids are of another kind.
        """
        x = self._checked(vectors)
        if len(ids) != len(x):
            raise DataError(f"{len(ids)} ids for {len(x)} vectors; give one id a row")
        if not self.moves_rows:
            return x
        slots = self._offset_slots(ids) if self.beta != 0 else np.full(len(x), -1)
        move = np.ones(len(x), dtype=np.bool_)
        if late is not None:
            slots = np.where(late, -1, slots)
            if self.late is LateRule.RAW:
                move = ~late
        return self._formula.apply(x, slots, move, f)

    def check_ids(self, ids: Ids) -> None:
        """Make sure that ids are of the kind that the refiner knows rows by.

        Raises:
            DataError: They are text where it knows numbers, or the other way round.
        """
        self._offset_slots(ids[:0])

    def __call__(self, queries: NDArray[Any]) -> Vectors:
        """Refine queries: through f where they move, unchanged otherwise.

        Args:
            queries: Shape (m, d), any float dtype.

        Returns:
            Shape (m, d), float32.

        Raises:
            DataError: The dimension is not the refiner's.
        """
        x = self._checked(queries)
        if not self.moves_queries:
            return x
        return self._formula.apply(x, np.full(len(x), -1), np.ones(len(x), dtype=np.bool_))

    def check(self, store: VectorStore) -> None:
        """Make sure that queries through this refiner belong to the rows of a store.

        A service calls it when it starts, and whenever the store may have been refined again.

        Raises:
            ConfigError: The store was refined by another refiner, or by none, or by any where this
                one moves queries alone; or its dimension or metric is another.
        """
        info = store.info()
        if (info.dim, info.metric) != (self.dim, self.metric):
            raise ConfigError(
                f"refiner {self.id} is for {self.dim} dimensions and {self.metric.value}, "
                f"{info.uri} has {info.dim} and {info.metric.value}"
            )
        note = marker_of(store)
        if self.side is Side.QUERIES:
            if note is not None:
                raise ConfigError(
                    f"{info.uri} holds rows refined by {note.get('refiner')}, and {self.id} "
                    "refines queries for rows as they were; load the refiner that wrote it "
                    f"(simskip status {shlex.quote(info.uri)})"
                )
            return
        if note is None or note.get("refiner") != self.id:
            held = "originals" if note is None else f"rows refined by {note.get('refiner')}"
            raise ConfigError(
                f"{info.uri} holds {held}, not by {self.id}; load the refiner that wrote it "
                f"(simskip status {shlex.quote(info.uri)})"
            )

    def save(self, folder: Path | str) -> None:
        """Write the refiner to two files in `folder`, which is made if need be.

        Each is replaced whole: the same refiner, saved again, is there at any instant.

        Args:
            folder: Receives ``refiner.safetensors`` and ``refiner.json``.

        Raises:
            StoreError: The folder cannot be written.
        """
        folder = Path(folder)
        tensors: dict[str, NDArray[Any]] = {"offsets": np.ascontiguousarray(self.offsets)}
        tensors["offset_ids"] = _ids_to_numbers(self.offset_ids)
        tensors["fitted_on"], tensors["chosen_on"] = self.fitted_on, self.chosen_on
        tensors["origin"] = self.origin
        for number, (weight, bias) in enumerate(self.layers):
            tensors[f"layers.{number}.weight"] = np.ascontiguousarray(weight)
            tensors[f"layers.{number}.bias"] = np.ascontiguousarray(bias)
        settings = {
            "schema": SCHEMA,
            "id": self.id,
            "dim": self.dim,
            "side": self.side.value,
            "metric": self.metric.value,
            "alpha": self.alpha,
            "beta": self.beta,
            "late": self.late.value,
            "layers": len(self.layers),
            "offset_ids": self.offset_ids.dtype.str,
            "info": dict(self.info),
        }
        write_durably(folder / WEIGHTS_FILE, safetensors.numpy.save(tensors))
        text = json.dumps(settings, indent=2, ensure_ascii=False)
        write_durably(folder / SETTINGS_FILE, f"{text}\n".encode())

    @classmethod
    def load(cls, folder: Path | str) -> Refiner:
        """Read a refiner that `save` wrote.

        Args:
            folder: Holds ``refiner.safetensors`` and ``refiner.json``.

        Raises:
            ConfigError: There is no refiner in `folder`, or a newer version wrote it.
            DataError: A file is damaged, or the two do not belong together.
        """
        folder = Path(folder)
        try:
            settings = json_of((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
            schema = settings["schema"]
            if schema not in READ:
                raise ConfigError(
                    f"{folder} holds a refiner of schema {schema!r}, this version reads "
                    f"{' and '.join(map(str, READ))}; upgrade simskip-vdb or fit again"
                )
            tensors = safetensors.numpy.load_file(folder / WEIGHTS_FILE)
            refiner = _from_parts(settings, tensors)
        except FileNotFoundError as error:
            raise ConfigError(
                f"no refiner in {folder}: {Path(error.filename or folder).name} is missing; "
                "give the folder that simskip fit wrote"
            ) from error
        except ConfigError:
            raise
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"the refiner in {folder} is damaged ({error}); fit again") from error
        if refiner.id != settings["id"]:
            raise DataError(
                f"the refiner in {folder} is damaged: {WEIGHTS_FILE} and {SETTINGS_FILE} make "
                f"{refiner.id}, not {settings['id']}; fit again"
            )
        return refiner

    def _made(self) -> Formula:
        return Formula.of(self.origin, self.layers, self.alpha, self.offsets, self.beta)

    def _checked(self, vectors: NDArray[Any]) -> Vectors:
        if vectors.ndim != 2 or vectors.shape[1] != self.dim:
            raise DataError(
                f"vectors have shape {vectors.shape}, the refiner was fitted on dimension "
                f"{self.dim}; use it on the index and vector that it was fitted on"
            )
        return np.asarray(vectors, dtype=np.float32)

    def _offset_slots(self, ids: Ids) -> NDArray[np.int64]:
        """Return each row's place in the offset table, -1 where it has none."""
        table = self.offset_ids
        if not len(table):
            return np.full(len(ids), -1)
        if table.dtype.kind in "iu" and ids.dtype.kind in "iu":
            ids = ids.astype(table.dtype)
        elif table.dtype.kind != ids.dtype.kind:
            raise DataError(
                f"row ids are {ids.dtype}, the refiner's are {table.dtype}; "
                "use it on the index that it was fitted on"
            )
        places = np.minimum(np.searchsorted(table, ids), len(table) - 1)
        return np.where(table[places] == ids, places, -1)


def _check(refiner: Refiner) -> None:
    if refiner.dim < 1:
        raise DataError(f"dimension {refiner.dim} is not positive")
    if refiner.side is Side.AUTO:
        raise DataError("a refiner moves docs, queries or both; auto is for a fit to choose")
    for name, factor in (("alpha", refiner.alpha), ("beta", refiner.beta)):
        if not (math.isfinite(factor) and factor >= 0):
            raise DataError(f"{name} is {factor}, not a finite number of at least 0")
    _check_origin(refiner.origin, refiner.dim)
    _check_layers(refiner.layers, refiner.dim)
    _check_offsets(refiner.offset_ids, refiner.offsets, refiner.dim)


def _check_origin(origin: Vectors, dim: int) -> None:
    if origin.shape not in ((0,), (dim,)) or origin.dtype != np.float32:
        raise DataError(f"an origin of shape {origin.shape} and {origin.dtype} for dimension {dim}")
    if not np.isfinite(origin).all():
        raise DataError("the origin holds numbers that are not finite")


def _check_layers(layers: tuple[Layer, ...], dim: int) -> None:
    width = dim
    for weight, bias in layers:
        if weight.dtype != np.float32 or bias.dtype != np.float32:
            raise DataError(f"layers are {weight.dtype} and {bias.dtype}, not float32")
        if weight.ndim != 2 or weight.shape[1] != width or bias.shape != weight.shape[:1]:
            raise DataError(f"a layer of shape {weight.shape} cannot follow a width of {width}")
        if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
            raise DataError("the layers hold numbers that are not finite")
        width = len(bias)
    if width != dim:
        raise DataError(f"the layers end at width {width}, not at dimension {dim}")


def _check_offsets(ids: Ids, offsets: Vectors, dim: int) -> None:
    if ids.ndim != 1 or ids.dtype.kind not in "iuS":
        raise DataError(f"offset ids are {ids.dtype}, not integers or text")
    if offsets.shape != (len(ids), dim) or offsets.dtype != np.float32:
        raise DataError(f"offsets of shape {offsets.shape} for {len(ids)} ids of dimension {dim}")
    if not np.isfinite(offsets).all():
        raise DataError("the offsets hold numbers that are not finite")
    if not (ids[1:] > ids[:-1]).all():
        raise DataError("offset ids are not in ascending order")


def _digest(refiner: Refiner) -> str:
    settings = (refiner.dim, refiner.side, refiner.alpha, refiner.beta, refiner.late)
    digest = hashlib.sha256(repr(settings).encode())
    arrays = [part for layer in refiner.layers for part in layer]
    arrays += [refiner.origin] if len(refiner.origin) else []
    for array in (*arrays, _ids_to_numbers(refiner.offset_ids), refiner.offsets):
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:12]


def _ids_to_numbers(ids: Ids) -> NDArray[Any]:
    """Return ids as safetensors can hold them: text becomes its bytes."""
    if ids.dtype.kind != "S":
        return np.ascontiguousarray(ids)
    return np.ascontiguousarray(ids).view(np.uint8).reshape(len(ids), ids.dtype.itemsize)


def _from_parts(settings: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]) -> Refiner:
    ids = tensors["offset_ids"]
    dtype = np.dtype(settings["offset_ids"])
    if dtype.kind == "S":
        ids = np.ascontiguousarray(ids).view(dtype).reshape(len(ids))
    elif dtype != ids.dtype:
        raise TypeError(f"offset ids are {ids.dtype}, not {dtype}")
    return Refiner(
        dim=settings["dim"],
        side=Side(settings["side"]),
        metric=Metric(settings["metric"]),
        alpha=float(settings["alpha"]),
        beta=float(settings["beta"]),
        origin=tensors["origin"] if settings["schema"] > 1 else _no_origin(),
        layers=tuple(
            (tensors[f"layers.{number}.weight"], tensors[f"layers.{number}.bias"])
            for number in range(settings["layers"])
        ),
        offset_ids=ids,
        offsets=tensors["offsets"],
        late=LateRule(settings["late"]),
        fitted_on=tensors["fitted_on"],
        chosen_on=tensors["chosen_on"],
        info=dict(settings["info"]),
    )
