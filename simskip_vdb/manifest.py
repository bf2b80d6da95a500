"""What the manifest of a state folder says, and how it is written down."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

IN_PLACE, NEW_VECTOR, NEW_COLLECTION = "in-place", "new-vector", "new-collection"


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRef:
    """A file of the state folder; or several, one for each partition of the index.

    Attributes:
        name: Its name; empty for several.
        sha256: Its checksum, 64 hex digits.
        rows: How many it holds.
        partition: Of which partition they are; empty where it is the whole index.
        parts: The several.
    """

    name: str
    sha256: str
    rows: int = 0
    partition: str = ""
    parts: tuple[FileRef, ...] = ()

    @classmethod
    def of_parts(cls, parts: Sequence[FileRef]) -> FileRef:
        """Name the files of all partitions together, in their order."""
        return cls(name="", sha256="", rows=sum(part.rows for part in parts), parts=tuple(parts))

    def part(self, partition: str) -> FileRef | None:
        """Return the file of a partition; None where it has none of its own."""
        return next((part for part in self.parts if part.partition == partition), None)

    @property
    def files(self) -> tuple[FileRef, ...]:
        """The file, or the several."""
        return self.parts or (self,)


@dataclass(frozen=True, slots=True, kw_only=True)
class Write:
    """One write to the index: done, or announced.

    Attributes:
        refiner: Id of the refiner whose vectors were written; empty for a rollback.
        before: Fingerprint before the write: SHA-256 of the index file, or `fingerprint_of` rows.
        originals: Every row as the application had written it.
        fingerprint: Fingerprint after the write; empty until it is known.
        written: Digests of all rows as read back; None until they were.
        kept: What takes the index back to before: the file from before the first write (None where
            rows changed in between), or the rows as an earlier refinement left them (None where
            there was none).
        time: Seconds since the epoch.
        mode: ``in-place``, ``new-vector`` or ``new-collection``.
        target: Name of the new vector or collection; empty in place.
        origin: Name of the collection that the alias led to before; empty but for a new one.
        summary: What `status` shows: side, measure, before, after, ci95, evidence.
        partitions: Of each partition, by name, that is written and verified, what `crew` says.
    """

    refiner: str
    before: str
    fingerprint: str
    originals: FileRef | None
    written: FileRef | None
    kept: FileRef | None
    time: float
    mode: str = IN_PLACE
    target: str = ""
    origin: str = ""
    summary: Mapping[str, Any] = field(default_factory=dict)
    partitions: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def beside(self) -> bool:
        """Whether refined vectors stand beside the rows' own, which are never ours."""
        return self.mode == NEW_VECTOR


@dataclass(frozen=True, slots=True, kw_only=True)
class Past:
    """A write before the current one, whose rows an application may still hold and save again.

    Attributes:
        refiner: Id of the refiner whose vectors were written.
        time: Seconds since the epoch.
        written: Digests of all rows as read back; None where the write was interrupted and undone.
    """

    refiner: str
    time: float
    written: FileRef | None = None

    @property
    def files(self) -> tuple[FileRef, ...]:
        """The files that hold these digests."""
        return () if self.written is None else self.written.files


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What the state folder holds and how far the index got.

    Attributes:
        state_id: Told apart by this from the state of any other index.
        index: Address of the index.
        dim: Dimension of its vectors.
        metric: How they are compared.
        current: The write whose vectors the index holds; None where it holds originals.
        pending: A write that was announced and not settled.
        copy_of: The index that this one is a refined copy of.
        history: Every refinement and rollback, as `status` shows them.
        past: Writes before the current one, which may come back.
        held: Originals of rows that were rolled back, for the same reason.
    """

    state_id: str
    index: str
    dim: int
    metric: str
    current: Write | None = None
    pending: Write | None = None
    copy_of: str | None = None
    history: tuple[Mapping[str, Any], ...] = ()
    past: tuple[Past, ...] = ()
    held: FileRef | None = None


def manifest_from(data: Mapping[str, Any]) -> Manifest:
    """Return the `Manifest` that `asdict` took apart."""
    known = {item.name for item in fields(Manifest)}
    values = {name: value for name, value in data.items() if name in known}
    for name in ("current", "pending"):
        values[name] = _write_from(values[name])
    values["history"] = tuple(dict(entry) for entry in values["history"])
    values["held"] = ref_from(values.get("held"))
    values["past"] = tuple(
        Past(**{**item, "written": ref_from(item["written"])}) for item in values.get("past") or ()
    )
    _check(values, state_id=str, index=str, metric=str, dim=int, copy_of=(str, type(None)))
    return Manifest(**values)


def _check(values: Mapping[str, Any], **kinds: type | tuple[type, ...]) -> None:
    """Make sure that values are of these types.

    Raises:
        TypeError: One is not, or is not there.
    """
    for name, kind in kinds.items():
        if not isinstance(values.get(name), kind):
            raise TypeError(f"{name} is {values.get(name)!r}")


def _write_from(data: Mapping[str, Any] | None) -> Write | None:
    if data is None:
        return None
    refs = {name: ref_from(data[name]) for name in ("originals", "written", "kept")}
    _check(data, refiner=str, before=str, fingerprint=str, time=(int, float), summary=dict)
    return Write(**{**data, **refs})


def ref_from(data: Mapping[str, Any] | None) -> FileRef | None:
    """Return the `FileRef` that `asdict` took apart."""
    if data is None:
        return None
    _check(data, name=str, sha256=str)
    parts = (ref_from(part) for part in data.get("parts", ()))
    return FileRef(**{**data, "parts": tuple(part for part in parts if part is not None)})
