"""The state on disk: what was read, what was written, what is kept to undo it.

A state folder holds

    manifest.json          the only file that is ever replaced; it names all the others
    originals-*.arrow      every row as the application wrote it: id, vector (Arrow IPC)
    written-*.arrow        every row as a write of ours left it: id, digest of its vector, digest of
                           its original, by the first digest (Arrow IPC); that of every write is
                           kept, since its rows may come back. Originals and these are one file, or
                           one for each partition of the index
    before-*.arrow         every row as an earlier refinement of ours had left it (Arrow IPC)
    unseen-*.arrow         originals of rows that a filter hides by now; never deleted (Arrow IPC)
    kept-*                 the index file as it was before the first write
    refiners/ID/           fitted refiners, and which rows each knows (known.arrow)
    fits/                  checkpoints of fits under way, or interrupted
    ledger.json            splits of queries, and looks at the test queries
    lock, holder           held while a run goes on, and by which process; the same in the usual
                           place of a state that is elsewhere, since that stands for the index
    crew/                  while processes of their own work on partitions: who may (`fence`)

Files are named by their content's hash, written whole, fsynced, and only then named in the
manifest; so at any instant the manifest points to complete files. A write to the index is announced
in the manifest (`pending`) before it happens, and confirmed after; what is found pending later is
decided by looking at the index: at its file, or, where rows are written one by one, at every row.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shlex
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from glob import glob
from itertools import chain, count
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple
from urllib.parse import unquote

import numpy as np

from simskip_vdb.claims import HOLDER, LOCK, Claim, StoreClaim
from simskip_vdb.datatypes import Ids, StoreInfo, VectorBatch, Vectors
from simskip_vdb.durable import (
    HashingFile,
    beside,
    disk_errors,
    has_file,
    json_of,
    make_durable,
    names_in,
    open_private,
    sha256_of,
    write_durably,
)
from simskip_vdb.errors import ConfigError, DataError, JournalError
from simskip_vdb.fence import shut_out
from simskip_vdb.manifest import (
    IN_PLACE,
    NEW_COLLECTION,
    NEW_VECTOR,
    FileRef,
    Manifest,
    Past,
    Write,
    manifest_from,
    ref_from,
)
from simskip_vdb.overlap import behind
from simskip_vdb.refiner import Refiner
from simskip_vdb.rows import (
    Digests,
    Rows,
    fingerprint_of,
    ids_from_arrow,
    ids_to_arrow,
    row_digests,
)
from simskip_vdb.store import VectorStore, abilities

__all__ = [
    "IN_PLACE",
    "KNOWN",
    "NEW_COLLECTION",
    "NEW_VECTOR",
    "FileRef",
    "Journal",
    "Manifest",
    "Past",
    "Write",
    "ref_from",
]

log = logging.getLogger(__name__)

SCHEMA = 1
KNOWN = "known.arrow"
LEDGER = "ledger.json"
OURS = re.compile(
    r"(originals|written|before)(-\d+)?(-[0-9a-f]{12}\.arrow|\.tmp)|kept-[0-9a-f]{12}"
)
"""Names of files that may be deleted; a state folder may be one that holds other things."""


class Known(NamedTuple):
    """The rows that a refiner knows.

    Attributes:
        ids: Shape (n,).
        digests: Of their originals, shape (n,).
        sketches: Of their originals, shape (n, 8); None where digests tell.
    """

    ids: Ids
    digests: Digests
    sketches: Vectors | None

    @property
    def fingerprint(self) -> str:
        """A hash of all of it."""
        rows = self.digests if self.sketches is None else self.digests ^ row_digests(self.sketches)
        return fingerprint_of(self.ids, rows)


class Journal:
    """The state of one index; open it as a context manager to hold its lock.

    Args:
        folder: The state folder; created when first written to.
        info: The index it belongs to.

    Attributes:
        other: Says that the folder is the state of an index of other vectors, or nothing.

    Raises:
        JournalError: The state is damaged or of a newer schema. Held, also: it is of another index.
    """

    def __init__(self, folder: Path, info: StoreInfo) -> None:
        self.folder = folder
        self._info = info
        self._held: list[Claim | StoreClaim] = []
        self._stack = ExitStack()
        self.scanned: FileRef | None = None
        self._known: dict[str, tuple[tuple[int, ...], Known]] = {}
        self._sound: dict[str, tuple[int, ...]] = {}
        self._sure = True  # that the manifest on disk is the one in memory
        self.other, self._undoes = "", False
        self.manifest = self._read_manifest()

    def __enter__(self) -> Journal:
        with ExitStack() as stack:
            stack.callback(self._held.clear)
            for claim in self._claims():
                claim.take()
                stack.callback(claim.drop)
                self._held.append(claim)
            shut_out(self.folder)
            self.manifest = self._read_manifest()
            self.usable()
            if self.other:
                self._set_aside()
            self.check()
            self._sweep()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.scanned = None
        with self._stack:
            self._sweep()

    def _claims(self) -> list[Claim]:
        """Return what a run holds: the state, and the place beside what is written."""
        state = Claim(self.folder, what=str(self.folder))
        place = self._info.claim or self._info.state
        if place is None or place.absolute() == self.folder.absolute():
            return [state]
        return [Claim(place, what=self._info.uri, passing=True), state]

    @property
    def _state_claims(self) -> list[Claim]:
        return [claim for claim in self._held if isinstance(claim, Claim)]

    @contextmanager
    def holding(self, store: VectorStore) -> Iterator[None]:
        """Hold the store as well, where it says itself who writes it.

        Raises:
            StateInUseError: Another run writes it.
            JournalError: Another run refined it meanwhile.
        """
        claim = StoreClaim(store, self.manifest.state_id)
        claim.take()
        self._held.append(claim)
        try:
            self.check_marker(store)
            yield
        finally:
            self._held.remove(claim)
            claim.drop()

    def check_marker(self, store: VectorStore) -> None:
        """Make sure that a store which says that it was refined is not taken for raw.

        Raises:
            JournalError: The state that its marker names is not this one.
        """
        marked = abilities(store).marker
        note = None if marked is None else marked.marker()
        if note is None:
            return
        known = has_file(self.folder / "manifest.json")
        if not known or note.get("state") != self.manifest.state_id:
            raise JournalError(
                f"{store.info().uri} is marked as refined by {note.get('refiner')}, but the state "
                f"that holds its originals is not in {self.folder}; name its folder by --state, or "
                "restore it from a backup. Nothing is refined twice"
            )

    def check(self) -> None:
        """Make sure that this run still holds the index and its state.

        Raises:
            StateInUseError: Another run took over, or the state was moved away.
        """
        for claim in self._held:
            claim.check()

    @property
    def refiners(self) -> Path:
        """Folder of fitted refiners, one a subfolder named by id."""
        return self.folder / "refiners"

    def refiner(self, name: str) -> Refiner:
        """Return the refiner of this id.

        Raises:
            JournalError: It is missing or damaged.
        """
        folder = self.refiners / name
        try:
            return Refiner.load(folder)
        except (ConfigError, DataError) as error:
            why = str(error).partition(";")[0]
            raise JournalError(f"{why}; restore the state folder from a backup") from error

    @property
    def fits(self) -> Path:
        """Folder of checkpoints, removed when a run has fitted."""
        return self.folder / "fits"

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(file.stat().st_size for file in self.folder.rglob("*") if file.is_file())

    def path(self, ref: FileRef) -> Path:
        """Return the path of a file that the manifest names, checked against its checksum once.

        Raises:
            JournalError: The file is missing or damaged.
        """
        path = self.folder / ref.name
        if not path.is_file():
            raise JournalError(f"{path} is missing; restore the state folder from a backup")
        seen = _seen(path)
        if self._sound.get(ref.name) != seen:
            if sha256_of(path) != ref.sha256:
                raise JournalError(
                    f"{path} is damaged (its checksum differs); restore the state folder from a "
                    "backup"
                )
            self._sound[ref.name] = seen
        return path

    def open_originals(self, write: Write) -> Rows:
        """Return the originals of the rows that a write touched.

        Raises:
            JournalError: There are none, or they are damaged.
        """
        if write.originals is None:
            raise JournalError(f"{self.folder} holds no originals of this index")
        return Rows(*map(self.path, write.originals.files))

    def save_originals(self, batches: Iterable[VectorBatch]) -> Rows:
        """Write the originals of the rows that are there now, and make them durable.

        They are `scanned` until a write names them; those of the last write stay beside them.
        """
        self._update()  # a folder that holds rows has a manifest
        ref = self.scanned = self._save_rows("originals", batches)
        return Rows(self.folder / ref.name)

    def adopt_originals(self, parts: Sequence[FileRef]) -> Rows:
        """Take the files that workers saved of all partitions as `save_originals` takes its own."""
        self.scanned = FileRef.of_parts(parts)
        return Rows(*(self.folder / part.name for part in parts))

    def begin(self) -> None:
        """Make sure that there is a manifest, for workers to read."""
        self._update()

    def note_partition(self, name: str, done: Mapping[str, Any]) -> None:
        """Record in the write that is announced that a partition is written and verified."""
        pending = self.manifest.pending
        assert pending is not None
        self._update(pending=replace(pending, partitions={**pending.partitions, name: done}))

    def save_unseen(self, ids: Ids, vectors: Vectors) -> FileRef:
        """Write the originals of rows that cannot be seen any more, for good."""
        return self._save_rows("unseen", [VectorBatch(ids=ids, vectors=vectors)])

    def save_before(self, batches: Iterable[VectorBatch]) -> FileRef:
        """Write rows as an earlier refinement left them, and make them durable."""
        return self._save_rows("before", batches)

    def _save_rows(self, stem: str, batches: Iterable[VectorBatch]) -> FileRef:
        import pyarrow as pa

        dim = self._info.dim

        def tables() -> Iterator[Any]:
            for batch in batches:
                flat = pa.array(np.ascontiguousarray(batch.vectors, np.float32).ravel())
                vectors = pa.FixedSizeListArray.from_arrays(flat, dim)
                yield pa.record_batch([ids_to_arrow(batch.ids), vectors], ["id", "vector"])

        empty = pa.record_batch(
            [pa.array([], pa.int64()), pa.array([], pa.list_(pa.float32(), dim))], ["id", "vector"]
        )
        return self._save_arrow(stem, tables(), empty)

    def announce(self, write: Write) -> None:
        """Record a write that is about to happen.

        Raises:
            JournalError: An original would not be safe.
            StateInUseError: Another run took over.
        """
        for ref in (write.originals, write.written):
            for file in () if ref is None else ref.files:
                if not (self.folder / file.name).is_file():
                    raise JournalError(
                        f"{self.folder / file.name} is gone, so originals would not be safe; "
                        "nothing was written. Run the command again"
                    )
        self._update(pending=write)

    def settle(self, *, happened: bool, done: Write | None = None) -> None:
        """Record whether the announced write happened; `done` tells more than was announced."""
        write = self.manifest.pending if done is None else done
        if write is None:
            return
        if not happened:
            begun = () if self._whole(write) else self._past_of(replace(write, written=None))
            held = self.manifest.held
            if begun and self.manifest.current is None:
                held = write.originals or held  # whoever read a row meanwhile may save it
            self._update(pending=None, past=(*self.manifest.past, *begun), held=held)
        else:
            entry = {
                "action": "refine" if write.refiner else "rollback",
                "refiner": write.refiner,
                "time": write.time,
                **write.summary,
            }
            current = self.manifest.current
            before = self._past_of(current) if current is not None else ()
            undone = None
            if not write.refiner and not write.beside:
                undone = write.originals or self.manifest.held
            self._update(
                pending=None,
                current=write if write.refiner else None,
                history=(*self.manifest.history, entry),
                past=(*self.manifest.past, *before),
                held=undone,
            )
        self._sweep()

    @staticmethod
    def _whole(write: Write) -> bool:
        """Tell whether a write is seen all at once, or not at all."""
        return bool(write.fingerprint)

    def _past_of(self, write: Write) -> tuple[Past, ...]:
        """Return a write as one that may come back, where it can and is not known as such."""
        past = Past(refiner=write.refiner, time=write.time, written=write.written)
        known = {(item.refiner, item.written) for item in self.manifest.past}
        if not write.refiner or write.beside or (past.refiner, past.written) in known:
            return ()
        return (past,)

    @property
    def past(self) -> tuple[Past, ...]:
        """Every write before the last one, those among it that left no digests."""
        manifest = self.manifest
        named = {item.refiner for item in manifest.past}
        writes = (manifest.current, manifest.pending)
        named |= {write.refiner for write in writes if write is not None} | {""}
        # Earlier versions kept no digests of writes before the last.
        unnamed = {entry["refiner"]: entry["time"] for entry in manifest.history}
        older = [
            Past(refiner=name, time=when)
            for name, when in sorted(unnamed.items())
            if name not in named and (self.refiners / name).is_dir()
        ]
        return (*manifest.past, *older)

    @property
    def original_ref(self) -> FileRef | None:
        """The originals of the last scan that a write named; None where the state holds none."""
        return next(iter(self._original_refs), None)

    @property
    def _original_refs(self) -> list[FileRef]:
        manifest = self.manifest
        writes = (manifest.pending, manifest.current)
        refs = [write.originals for write in writes if write is not None] + [manifest.held]
        return list({ref.files: ref for ref in refs if ref is not None}.values())

    def held_originals(self) -> list[Rows]:
        """Return all originals that the state holds, those of the last write first.

        Raises:
            JournalError: They are damaged.
        """
        rows = [Rows(*map(self.path, ref.files)) for ref in self._original_refs]
        return rows + [Rows(path) for path in sorted(self.folder.glob("unseen-*.arrow"))]

    def save_written(self, ids: Ids, digests: Digests, originals: Digests) -> FileRef:
        """Write the digests of rows as read back and of their originals, and make them durable.

        They take 24 bytes a row where ids are numbers.
        """
        return self._save_digests("written", ids, digests, originals)

    def _save_digests(self, stem: str, ids: Ids, digests: Digests, originals: Digests) -> FileRef:
        import pyarrow as pa

        order = np.argsort(digests, kind="stable")
        columns = [ids_to_arrow(ids[order]), pa.array(digests[order]), pa.array(originals[order])]
        batch = pa.record_batch(columns, ["id", "digest", "original"])
        return self._save_arrow(stem, [batch], batch)

    def open_written(self, ref: FileRef) -> tuple[Ids, Digests]:
        """Return ids and digests saved by `save_written`."""
        import pyarrow as pa

        found = []
        for path in map(self.path, ref.files):
            with pa.OSFile(str(path)) as source:
                table = pa.ipc.open_file(source).read_all()
            found.append((ids_from_arrow(table["id"]), table["digest"].to_numpy()))
        held = [part for part in found if len(part[0])] or found[:1]
        return np.concatenate([ids for ids, _ in held]), np.concatenate([d for _, d in held])

    def save_known(
        self, refiner: str, ids: Ids, digests: Digests, sketches: Vectors | None = None
    ) -> None:
        """Record which rows a refiner knows, and by which original: others arrived after its fit.

        Args:
            refiner: Its id; its folder exists.
            ids: Shape (n,).
            digests: Of the originals, shape (n,).
            sketches: Of the originals (`by_vector.sketch`), where digits of what is read vary.
        """
        import pyarrow as pa

        known = Known(ids, digests, sketches)
        columns = {"id": ids_to_arrow(ids), "digest": pa.array(digests)}
        if sketches is not None:
            flat = pa.array(sketches.ravel())
            columns["sketch"] = pa.FixedSizeListArray.from_arrays(flat, sketches.shape[1])
        batch = pa.record_batch(list(columns.values()), list(columns))
        batch = batch.replace_schema_metadata({"fingerprint": known.fingerprint})
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, batch.schema) as writer:
            writer.write_batch(batch)
        data = sink.getvalue().to_pybytes()
        checked = data + hashlib.sha256(data).digest()
        write_durably(self.refiners / refiner / KNOWN, checked, private=True)

    def known(self, refiner: str) -> Known | None:
        """Return what `save_known` was given; None where it never was.

        Raises:
            JournalError: The file is damaged.
        """
        import pyarrow as pa

        path = self.refiners / refiner / KNOWN
        if not path.is_file():
            return None
        seen = _seen(path)
        if refiner in self._known and self._known[refiner][0] == seen:
            return self._known[refiner][1]
        try:
            table = _checked_table(path.read_bytes())
            sketches = None
            if "sketch" in table.column_names:
                flat = table["sketch"].combine_chunks().flatten().to_numpy()
                sketches = flat.reshape(len(table), table.schema.field("sketch").type.list_size)
            known = Known(ids_from_arrow(table["id"]), table["digest"].to_numpy(), sketches)
            if table.schema.metadata[b"fingerprint"].decode() != known.fingerprint:
                raise ValueError("its checksum differs")
        except (OSError, pa.ArrowException, ValueError, KeyError, TypeError) as error:
            raise JournalError(
                f"{path} is damaged ({error}); restore the state folder from a backup"
            ) from error
        self._known[refiner] = seen, known
        return known

    def forget_kept(self) -> list[str]:
        """Let go of what no rollback needs any more; return what was removed.

        That is the index file from before the first write; and originals that were brought back.
        """
        current, held = self.manifest.current, self.manifest.held
        removed = [] if held is None else [file.name for file in held.files]
        if current is not None and current.kept is not None:
            removed.append(current.kept.name)
            current = replace(current, kept=None)
        if removed:
            self._update(current=current, held=None)
            self._sweep()
        return removed

    def forget_history(self, refiners: int, entries: int | None) -> None:
        """Keep the history of the current refiner and of as many before it as are wanted.

        Args:
            refiners: How many before the current one.
            entries: Most entries, the last ones, beside each refiner's first; None for all.
        """
        history = self.manifest.history
        first = {entry["refiner"]: number for number, entry in reversed([*enumerate(history)])}
        last = {entry["refiner"]: number for number, entry in enumerate(history)}
        writes = (self.manifest.current, self.manifest.pending)
        held = {write.refiner for write in writes if write is not None}
        past = sorted(set(last) - held - {""}, key=lambda name: last[name])
        kept = held | {""} | set(past[len(past) - refiners :] if refiners else ())
        start = 0 if entries is None else len(history) - entries
        left = tuple(
            entry
            for number, entry in enumerate(history)
            if entry["refiner"] in kept and (number >= start or number == first[entry["refiner"]])
        )
        known = tuple(item for item in self.manifest.past if item.refiner in kept)
        if len(left) < len(history) or len(known) < len(self.manifest.past):
            self._update(history=left, past=known)
            self._sweep()

    def mark_copy(self, source: str, write: Write) -> None:
        """Record that this index is a refined copy of another one."""
        self._update(copy_of=source, current=write)

    def _update(self, **changes: Any) -> None:  # noqa: ANN401 fields of Manifest
        for claim in self._state_claims:
            claim.check()
        manifest = replace(self.manifest, **changes)
        data = {"schema": SCHEMA, **asdict(manifest)}
        self._sure = False
        write_durably(self.folder / "manifest.json", json.dumps(data, indent=1).encode())
        self.manifest, self._sure = manifest, True

    def _read_manifest(self) -> Manifest:
        path = self.folder / "manifest.json"
        info = self._info
        if not has_file(path):
            if any(map(OURS.fullmatch, names_in(self.folder))):
                raise JournalError(
                    f"{path} is missing beside what it names, so nobody can tell originals from "
                    "refined rows; restore the state folder from a backup"
                )
            return self._fresh()
        try:
            data = json_of(path.read_bytes())
            schema = data.pop("schema")
            if schema != SCHEMA:
                raise JournalError(
                    f"{path} has schema {schema}, this version reads {SCHEMA}; upgrade simskip-vdb"
                )
            manifest = manifest_from(data)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, JournalError):
                raise
            raise JournalError(
                f"{path} cannot be read ({error}); restore the state folder from a backup"
            ) from error
        written = manifest.current or manifest.pending
        if (manifest.dim, manifest.metric) != (info.dim, info.metric.value):
            self.other = (
                f"{self.folder} is the state of another index "
                f"({manifest.dim} dimensions, {manifest.metric}), not of {info.uri} "
                f"({info.dim}, {info.metric.value})"
            )
            self._undoes = written is not None
            if self._undoes:
                folder, aside = (shlex.quote(str(path)) for path in (self.folder, self._aside))
                self.other += (
                    ", and holds what undoes its refinement. If the index was built anew and that "
                    f"is not needed any more: mv {folder} {aside}; else choose another state with "
                    "--state"
                )
            return self._fresh()
        self.other = ""
        if written is not None and unquote(manifest.index) != unquote(info.uri):
            if self.folder != info.state and _still_there(manifest.index):
                raise JournalError(
                    f"{self.folder} is the state of {manifest.index}, not of {info.uri}; give each "
                    "index a state folder of its own with --state"
                )
            manifest = replace(manifest, index=info.uri)  # the index moved, and its state with it
        return manifest

    def _fresh(self) -> Manifest:
        info = self._info
        return Manifest(
            state_id=uuid.uuid4().hex, index=info.uri, dim=info.dim, metric=info.metric.value
        )

    def usable(self) -> None:
        """Make sure that this is the state of this index, or one that can be set aside.

        Raises:
            JournalError: It is of another index, and undoes what was written there.
        """
        if self.other and self._undoes:
            raise JournalError(self.other)

    @property
    def _aside(self) -> Path:
        """A place beside this one that is free."""
        places = (beside(self.folder, f".of-another-index-{number}") for number in count())
        return next(place for place in places if not place.exists())

    def _set_aside(self) -> None:
        """Make room where the state is of an index that was here before, and undoes nothing.

        Its ledger stays: another encoder makes queries that were looked at no new ones.
        """
        place = self._aside
        with disk_errors(place):
            place.mkdir(mode=0o700)
            for file in sorted(self.folder.iterdir()):
                if file.name not in (LOCK, HOLDER, LEDGER):
                    os.replace(file, place / file.name)
            make_durable(self.folder)
        log.warning("%s; it undoes nothing, and was set aside as %s", self.other, place)
        self.manifest = self._read_manifest()

    def _save_arrow(self, stem: str, batches: Iterable[Any], empty: Any) -> FileRef:  # noqa: ANN401 pyarrow
        """Write record batches; `empty` has their schema where there are none."""
        import pyarrow as pa

        batches = iter(batches)
        first = next(batches, empty)

        temporary = self.folder / f"{stem}.tmp"
        rows = 0

        def counted(batches: Iterable[Any]) -> Iterator[Any]:
            nonlocal rows
            for batch in batches:
                yield batch
                rows += batch.num_rows

        with disk_errors(self.folder), open_private(temporary) as file:
            sink = HashingFile(file)
            with pa.ipc.new_file(pa.PythonFile(sink, mode="w"), first.schema) as writer:
                behind(writer.write_batch, counted(chain([first], batches)))
            file.flush()
            os.fsync(file.fileno())
            digest = sink.sha256.hexdigest()
            name = f"{stem}-{digest[:12]}.arrow"
            os.replace(temporary, self.folder / name)
            make_durable(self.folder)
        return FileRef(name=name, sha256=digest, rows=rows)

    def _sweep(self) -> None:
        """Delete what a killed run or a finished write left unnamed.

        Not where the manifest could not be written, or is another run's by now: the one on disk may
        name other files. What cannot be deleted now is deleted another time.
        """
        if not self._sure or not all(claim.held for claim in self._state_claims):
            return
        manifest = self.manifest
        refs = [self.scanned, manifest.held, *(item.written for item in manifest.past)]
        for write in (manifest.current, manifest.pending):
            if write is not None:
                refs += [write.originals, write.written, write.kept]
                refs += [ref_from(done["written"]) for done in write.partitions.values()]
        named = {file.name for ref in refs if ref is not None for file in ref.files}
        for file in self.folder.iterdir():
            if OURS.fullmatch(file.name) and file.name not in named and file.is_file():
                try:
                    file.unlink()
                except OSError as error:
                    log.info("%s cannot be removed: %s", file, error)


def _checked_table(data: bytes) -> Any:  # noqa: ANN401 pyarrow
    """Return what an Arrow stream holds, once the SHA-256 behind it was found right."""
    import pyarrow as pa

    if data.startswith(b"ARROW1"):  # an earlier version's, which had none
        table = pa.ipc.open_file(pa.py_buffer(data)).read_all()
        table.validate(full=True)
        return table
    if hashlib.sha256(data[:-32]).digest() != data[-32:]:
        raise ValueError("its checksum differs")
    return pa.ipc.open_stream(pa.py_buffer(data)).read_all()


def _seen(path: Path) -> tuple[int, ...]:
    """Tell a file from one that was written since."""
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _still_there(uri: str) -> bool:
    """Tell whether an index that was moved could be at its old address; a server always could."""
    place = (uri.partition(":")[2] or uri).partition("?")[0]
    paths = (place, unquote(place))
    return place.startswith("//") or any(Path(path).exists() or glob(path) for path in paths)
