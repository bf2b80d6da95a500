"""The nouns that every part of the project passes around."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
from numpy.typing import NDArray

_UUID = re.compile(
    r"(?:urn:uuid:)?(?:[0-9a-f]{32}|(\{)?[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}(?(1)\}))",
    re.IGNORECASE,
)
_WHOLE = re.compile(r"-[0-9]{1,19}|[0-9]{19,20}")  # negative, or beyond what int64 holds

Vectors = NDArray[np.float32]
"""Row vectors, shape (n, d)."""
Ids = NDArray[Any]
"""Row ids, shape (n,): int64 in FAISS; in Qdrant text, dtype S44; in files either, and text of any
length."""
ID_TEXT = np.dtype("S44")
"""Row ids that are text, in UTF-8: in Qdrant a number or a UUID, and behind ``#`` which vector of
several it is. Where ids are longer, `id_text` makes room."""
Mask = NDArray[np.bool_]
"""A choice among rows, shape (n,)."""
Cursor = int | str
"""Where a scan goes on."""
Positions = NDArray[np.int64]
"""Row numbers in scan order, shape (n,)."""

Progress = Callable[[str, int, int], None]
"""Hears of progress: (stage, done, of how many)."""


def id_names(ids: Ids) -> list[str]:
    """Return row ids as a person writes them."""
    if ids.dtype.kind == "S":
        return [i.decode("utf-8", "replace") for i in ids.tolist()]
    return [str(i) for i in ids.tolist()]


def id_text(texts: Sequence[bytes] | NDArray[Any]) -> Ids:
    """Return row ids that are text, given as bytes, in as wide a type as they need, shape (n,)."""
    found = np.asarray(texts)
    if found.dtype.kind == "O":
        found = found.astype(np.bytes_)
    if not len(found):
        return np.empty(0, ID_TEXT)
    width = max(ID_TEXT.itemsize, -(-found.dtype.itemsize // 4) * 4)  # whole words, to be hashed
    return found.astype(f"S{width}")


def id_forms(name: str) -> tuple[str, ...]:
    """Return other ways to write an id: a UUID's, or the number that has the same 64 bits."""
    if _UUID.fullmatch(name):
        plain = str(UUID(name))
        digits = plain.replace("-", "")
        forms: tuple[str, ...] = (
            plain,
            digits,
            f"urn:uuid:{plain}",
            f"{{{plain}}}",
            plain.upper(),
            digits.upper(),
        )
    elif _WHOLE.fullmatch(name):
        number = int(name)
        forms = (str(number + 2**64 if number < 0 else number - 2**64),)
    else:
        return ()
    return tuple(form for form in forms if form != name)


def find_ids(where: Mapping[str, int], names: Sequence[str]) -> Positions:
    """Return the position of each id, shape (len(names),), -1 for those that are not there.

    An id is there if it is written as it is, or else in one of its other forms.
    """
    found = np.fromiter((where.get(name, -1) for name in names), np.int64, len(names))
    for at in np.flatnonzero(found < 0).tolist():
        found[at] = next((where[form] for form in id_forms(names[at]) if form in where), -1)
    return found


def silent(stage: str, done: int, total: int) -> None:
    """Show no progress."""


class Metric(str, Enum):
    """How a store compares a query with a row."""

    COSINE = "cosine"
    DOT = "dot"
    EUCLID = "euclid"


class Side(str, Enum):
    """What moves: only the stored rows, only the queries, or both; AUTO lets validation choose."""

    DOCS = "docs"
    QUERIES = "queries"
    BOTH = "both"
    AUTO = "auto"


class Split(str, Enum):
    """What a query is used for."""

    FIT = "fit"
    VALIDATION = "validation"
    TEST = "test"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreInfo:
    """What a store says of itself.

    Attributes:
        uri: Address, without secrets.
        kind: What it is, in a person's words, such as ``IVF32 Flat``.
        count: Rows.
        dim: Dimension of a vector.
        metric: How queries and rows are compared.
        positional: True where a row's id is its position, so ids shift when rows are removed.
        exact: True where a vector is read back as it was written, bit for bit.
        lossy: True where it is read back too coarsely to be refined.
        rounding: Relative L2 distance within which a vector that is not exact is read back.
        exhaustive: True where a search compares every row, as exact search does.
        payload: True where rows have payload fields.
        document_ids: The payload field that names rows where nobody names another; None where
            judgments name index ids.
        partial: True where a filter hides rows, so that one may leave or enter.
        state: Folder where the state of this store is kept, unless told otherwise; None where
            there is no usual place.
        claim: Folder where it is noted who writes; None for that of the state.
        details: Index parameters worth showing, by FAISS's or Qdrant's own names.
    """

    uri: str
    kind: str
    count: int
    dim: int
    metric: Metric
    positional: bool = False
    exact: bool = True
    lossy: bool = False
    rounding: float = 2e-3
    exhaustive: bool = False
    payload: bool = False
    document_ids: str | None = None
    partial: bool = False
    state: Path | None = None
    claim: Path | None = None
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tolerance(self) -> float:
        """Relative L2 distance within which two vectors that are read are the same one."""
        return 0.0 if self.exact else self.rounding


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class VectorBatch:
    """Some rows of a store.

    Attributes:
        ids: Shape (b,).
        vectors: Shape (b, d), float32.
        fields: Payload columns that were asked for, each of length b.
        cursor: Where a later scan goes on after this batch.
    """

    ids: Ids
    vectors: Vectors
    fields: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    cursor: Cursor | None = None

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Neighbors:
    """Answer to a search, best first.

    Attributes:
        ids: Shape (q, k); -1, or empty where ids are text, if fewer than k rows were found.
        scores: Shape (q, k), float32, higher is better (L2 is negated); -inf where there is no row.
    """

    ids: Ids
    scores: NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class JudgedQueries:
    """Queries of one split with the rows judged for them, in compressed sparse rows.

    Attributes:
        ids: Query ids, length m.
        vectors: Shape (m, d), float32.
        indptr: Shape (m + 1,), int64; query i's judgments are ``rows[indptr[i]:indptr[i + 1]]``.
        rows: Positions of judged rows in scan order, int64.
        grades: Relevance of each judgment, int32; 0 means judged not relevant.
        own: Position of the row that a query is itself, which is no result of it, shape (m,); -1
            where it is none. None where no query is a row.
    """

    ids: tuple[str, ...]
    vectors: Vectors
    indptr: NDArray[np.int64]
    rows: Positions
    grades: NDArray[np.int32]
    own: Positions | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def query_of_judgment(self) -> NDArray[np.int64]:
        """Return the query's index for every judgment, shape (len(rows),)."""
        return np.repeat(np.arange(len(self.ids)), np.diff(self.indptr))

    def subset(self, keep: NDArray[np.bool_]) -> JudgedQueries:
        """Return the queries where ``keep`` (shape (m,)) is true."""
        judged = np.repeat(keep, np.diff(self.indptr))
        sizes = np.diff(self.indptr)[keep]
        return JudgedQueries(
            ids=tuple(q for q, kept in zip(self.ids, keep, strict=True) if kept),
            vectors=self.vectors[keep],
            indptr=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
            rows=self.rows[judged],
            grades=self.grades[judged],
            own=None if self.own is None else self.own[keep],
        )
