"""A FAISS index in a file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from simskip_vdb.connectors.faiss_flat import FlatFile
from simskip_vdb.connectors.faiss_gpu import MOST_NEIGHBOURS, on_gpu
from simskip_vdb.connectors.faiss_layout import Layout, take_apart
from simskip_vdb.connectors.faiss_lists import (
    ListFile,
    check_origin,
    list_file,
    settle,
    switching,
)
from simskip_vdb.connectors.faiss_open import (
    Trust,
    faiss_call,
    give_back_memory,
    read_mapped,
)
from simskip_vdb.connectors.faiss_payload import columns, payload_beside
from simskip_vdb.connectors.faiss_rebuild import rebuild
from simskip_vdb.connectors.faiss_tree import Fidelity, Index
from simskip_vdb.connectors.folders import locate, nothing_at
from simskip_vdb.connectors.originals import ArrayRows
from simskip_vdb.connectors.part_notes import refuse_part
from simskip_vdb.connectors.rows import (
    OneFile,
    RowOrder,
    checked_queries,
    no_partitions,
    only_vectors,
)
from simskip_vdb.connectors.swap import (
    Identity,
    appear,
    check_free,
    confirm,
    copy_durably,
    keep_as,
    staged,
    swap_in,
    sweep,
    take_mode_and_owner,
    unchanged,
)
from simskip_vdb.datatypes import Cursor, Ids, Neighbors, StoreInfo, VectorBatch, Vectors
from simskip_vdb.durable import beside, disk_errors, make_durable
from simskip_vdb.errors import (
    ConfigError,
    StoreError,
    StoreNotFoundError,
    UnsupportedIndexError,
    VerificationError,
)
from simskip_vdb.store import Candidate, ExactVectors

_SCHEME = "faiss:"
_ROWS = 8192


class FaissStore(OneFile):
    """A `VectorStore` that is one file, written by ``faiss.write_index``.

    Its inverted lists may be in a file of their own, beside which new ones are written.

    The index is read through a memory map. A file that changes underneath is noticed before each
    batch and each search; an application that saves over it *during* one can still end the
    process, as it would any reader of the map.
    """

    def __init__(
        self, path: Path | str, *, read_only: bool = False, trust: Trust = Trust.NONE
    ) -> None:
        """Open an index, by its file or by the folder that a framework saved.

        Args:
            path: The file or the folder.
            read_only: Refuse every write.
            trust: What is known of the file already.

        Raises:
            StoreNotFoundError: There is no such file.
            UnsupportedIndexError: The index cannot be refined.
            StoreError: The file is not an index, or damaged.
        """
        self._path = locate(Path(path)).resolve()
        self._read_only = read_only
        self._originals: ExactVectors | None = None
        self._payload = payload_beside(self._path)
        self._open(trust)

    @classmethod
    def open(cls, uri: str, *, read_only: bool) -> FaissStore:
        """Open ``faiss:PATH`` or a plain path.

        Raises:
            ConfigError: The file was refined as a part of an index of several.
        """
        store = cls(uri.removeprefix(_SCHEME), read_only=read_only)
        refuse_part(store.path)
        return store

    def info(self) -> StoreInfo:
        """Describe the index as it was opened."""
        layout = self._layout
        return StoreInfo(
            uri=self._uri,
            kind=layout.kind,
            count=len(layout),
            dim=layout.dim,
            metric=layout.metric,
            positional=layout.positional,
            exact=layout.fidelity is Fidelity.EXACT,
            lossy=layout.fidelity is Fidelity.LOSSY,
            payload=self._payload is not None,
            document_ids=None if self._payload is None else self._payload.ids,
            state=beside(self.path, ".simskip"),
            details=layout.details,
        )

    def scan(
        self,
        batch_size: int,
        *,
        fields: Sequence[str] = (),
        cursor: Cursor | None = None,
        partition: int | None = None,
    ) -> Iterator[VectorBatch]:
        """Yield every row once; see `VectorStore.scan`.

        The order is that of the positions or of the id map; an IVF goes by ascending id, so that
        the order is the same after vectors were replaced.
        """
        known: dict[int, list[Any]] = {}
        if self._payload is None or not fields:
            only_vectors(self._uri, fields, partition)
        else:
            no_partitions(self._uri, partition)
            known = self._payload.read(fields)
        windows = self._rows.windows(batch_size, cursor)
        return (
            VectorBatch(
                ids=self._rows.ids[start:stop],
                vectors=self._read(start, stop),
                fields=columns(known, self._rows.ids[start:stop], fields),
                cursor=stop,
            )
            for start, stop in windows
        )

    def fetch(self, ids: Ids) -> Vectors:
        """Return the vectors of these ids; see `VectorStore.fetch`."""
        positions = self._rows.positions(ids)
        self._unchanged()
        with faiss_call(self._path, "reading rows"):
            return self._layout.take(positions)

    def take_originals(self, source: ExactVectors | Vectors) -> None:
        """Remember where the exact vectors are; see `TakesOriginals.take_originals`."""
        layout = self._layout
        if layout.fidelity is not Fidelity.LOSSY:
            raise ConfigError(
                f"{self._uri}: {layout.kind} holds its vectors itself; leave --originals out"
            )
        if not isinstance(source, np.ndarray):
            self._originals = source
            return
        if not layout.in_order:
            raise ConfigError(
                f"{self._uri}: {layout.kind} does not keep the order in which rows were added; "
                "give the id of each original with --originals-ids FILE, one a line"
            )
        self._originals = ArrayRows(self._rows, source, "--originals")

    def originals(self, ids: Ids) -> Vectors:
        """Return the exact vectors of these ids; see `TakesOriginals.originals`."""
        if self._layout.fidelity is not Fidelity.LOSSY:
            return self.fetch(ids)
        if self._originals is None:
            raise UnsupportedIndexError(
                f"{self._uri}: {self._layout.kind} stores lossy codes, and refining decoded codes "
                "would lose twice. Give the exact vectors with --originals FILE.npy (or another "
                "index that holds them), or keep them beside the codes: add ',Refine(Flat)' to "
                "the factory string"
            )
        vectors = np.ascontiguousarray(self._originals.fetch(ids), np.float32)
        if vectors.shape != (len(ids), self._layout.dim):
            raise ConfigError(
                f"{self._uri}: the originals have {vectors.shape[-1]} dimensions, the index has "
                f"{self._layout.dim}"
            )
        return vectors

    def search(self, queries: Vectors, k: int, params: Mapping[str, Any]) -> Neighbors:
        """Search through the index; see `VectorStore.search`.

        Args:
            queries: Shape (q, d).
            k: Rows wanted for each query.
            params: ``nprobe``, ``efSearch`` (or ``hnsw_ef``), ``k_factor``,
                ``quantizer_efSearch``; they hold for this call only.
        """
        array = checked_queries(self._uri, queries, self._layout.dim, k)
        self._unchanged()
        with self._layout.using(params), faiss_call(self._path, "searching"):
            if len(self._layout) == 0:  # which some of FAISS's types do not survive
                shape = (len(array), k)
                return Neighbors(
                    ids=np.full(shape, -1, np.int64), scores=np.full(shape, -np.inf, np.float32)
                )
            distances, ids = self._searcher(k).search(array, k)
        similarity = self._layout.root.metric_type == faiss.METRIC_INNER_PRODUCT
        # Ids may be any 64 bits, such as hashes; -1 alone is FAISS's word for no row.
        scores = np.where(ids == -1, -np.inf, distances if similarity else -distances)
        return Neighbors(ids=ids, scores=scores.astype(np.float32))

    @contextmanager
    def prepared(
        self, batches: Iterable[VectorBatch], *, keep: Path | None, expected: str
    ) -> Iterator[Candidate]:
        """Write the index anew beside itself; see `FileBacked.prepared`."""
        self._writable()
        self._unchanged()
        old, new = self._lists, None
        if old is not None:
            new = old.successor(replaces_ours=keep is None)
        with (
            switching(self._path, old=old if keep is None else None, new=new),
            staged(self._path) as temporary,
        ):
            take_mode_and_owner(temporary, self._path)
            candidate = self._written(batches, temporary, new)
            yield Candidate(candidate, partial(self._swap_in, temporary, keep, expected))

    def _swap_in(self, temporary: Path, keep: Path | None, expected: str) -> None:
        self._unchanged(expected)
        take_mode_and_owner(temporary, self._path)
        keep_as(self._path, keep, expected)
        self._unchanged()
        written = Identity.of(temporary)
        swap_in(temporary, self._path)
        self._open(Trust.ALL if Identity.of(self._path) == written else Trust.NONE)
        confirm(self._path)

    @contextmanager
    def prepared_copy(self, batches: Iterable[VectorBatch], output: Path) -> Iterator[Candidate]:
        """Write the rewritten index to a new file; see `FileBacked.prepared_copy`."""
        check_free(output)
        new = None if self._lists is None else self._lists.copied_to(output)
        with switching(output, old=None, new=new), staged(output) as temporary:
            candidate = self._written(batches, temporary, new)
            yield Candidate(candidate, partial(appear, temporary, output, self._path))

    def info_at(self, path: Path) -> StoreInfo:
        """Describe a copy at another path; see `FileBacked.info_at`."""
        path = path.resolve()
        return replace(self.info(), uri=f"{_SCHEME}{path}", state=beside(path, ".simskip"))

    def put_back(self, kept: Path, *, expected: str) -> None:
        """Swap a kept file back; see `FileBacked.put_back`.

        The kept file is copied, not linked: an application that saves in place must not reach it.

        Raises:
            StoreNotFoundError: The kept file is gone.
            StoreChangedError: The file's hash is not `expected`.
        """
        self._writable()
        if not kept.is_file():
            raise StoreNotFoundError(f"{kept}: the kept file is gone; {self._path} is unchanged")
        with switching(self._path, old=self._lists, new=None), staged(self._path) as temporary:
            with disk_errors(self._path):
                copy_durably(kept, temporary)
            if self._lists is not None:
                check_origin(self._lists, _lists_of(temporary, kept), kept)
            take_mode_and_owner(temporary, self._path)
            self._unchanged(expected)
            swap_in(temporary, self._path)
            self._open()
            confirm(self._path)

    def reopen(self) -> None:
        """Look at the file anew, which one of our own processes has written and checked."""
        self._open(Trust.ALL)

    def sweep(self) -> None:
        """Remove what a killed write left behind; see `LeavesFiles.sweep`."""
        if not self._read_only:
            sweep(self._path)
            settle(self._path)

    @property
    def _uri(self) -> str:
        return f"{_SCHEME}{self._path}"

    def _open(self, trust: Trust = Trust.NONE) -> None:
        path = self._path
        if not path.exists():
            raise nothing_at(path, str(path))
        if not path.is_file():
            raise StoreError(f"{path}: not a file; no FAISS index can be read from it")
        with disk_errors(path):
            self._identity = Identity.of(path)
            self._flat = FlatFile.find(path)
        with faiss_call(path, "this is not a FAISS index that can be read"):
            root = read_mapped(path, trust if self._flat is None else Trust.ALL)
            if not root.is_trained and not root.ntotal:
                raise UnsupportedIndexError(
                    f"{path}: this index is not trained and has no rows; train it, add rows, and "
                    "save it again"
                )
            self._layout: Layout = take_apart(root, self._uri)
            self._lists: ListFile | None = list_file(root, path)
        self._fast: Index = None
        if self._lists is not None:
            with disk_errors(self._lists.path):
                self._lists_identity = Identity.of(self._lists.path)
        self._rows = RowOrder(self._layout.ids, self._uri)

    def _searcher(self, k: int) -> Index:
        if k > MOST_NEIGHBOURS:
            return self._layout.root
        if self._fast is None:
            self._fast = on_gpu(self._layout.root)
        return self._fast

    def _unchanged(self, expected: str | None = None) -> None:
        unchanged(self._path, self._identity, expected)
        if self._lists is not None:
            unchanged(self._lists.path, self._lists_identity)

    def _read(self, start: int, stop: int) -> Vectors:
        self._unchanged()
        with faiss_call(self._path, "reading rows"):
            if self._flat is not None:
                return self._flat.read(start, stop)
            return self._layout.read(start, stop)

    def _written(
        self, batches: Iterable[VectorBatch], target: Path, lists: ListFile | None
    ) -> FaissStore:
        """Write the rewritten index to `target`, its lists to `lists`, and open it."""
        self._drop_pages()
        rows = self._merged(batches)
        if self._flat is not None:
            with disk_errors(target):
                self._flat.write_like(target, rows)
                make_durable(target)
        else:
            index = rebuild(self._path, self._layout, rows, lists)
            with faiss_call(target, "writing the new index; is the disk full?"):
                faiss.write_index(index, str(target))
                make_durable(target)
            del index
            give_back_memory()
            self._drop_pages()
        candidate = FaissStore(target, read_only=True, trust=Trust.HEADER)
        self._verify(candidate)
        return candidate

    def _drop_pages(self) -> None:
        """Map the file anew: its pages that were read count as memory."""
        self._unchanged()
        self._open(Trust.ALL)

    def _merged(self, batches: Iterable[VectorBatch]) -> Iterator[Vectors]:
        """Yield all rows in scan order: new vectors where there are any, else the stored ones."""
        done = 0
        for positions, vectors in self._rows.changes(batches, self._layout.dim):
            for start in range(done, positions[-1] + 1, _ROWS):
                stop = min(start + _ROWS, int(positions[-1]) + 1)
                first, last = np.searchsorted(positions, (start, stop))
                if last - first == stop - start:
                    yield vectors[first:last]
                    continue
                block = self._kept(start, stop)
                block[positions[first:last] - start] = vectors[first:last]
                yield block
            done = int(positions[-1]) + 1
        for start, stop in self._rows.windows(_ROWS, done):
            yield self._kept(start, stop)

    def _kept(self, start: int, stop: int) -> Vectors:
        """Return rows that keep their vectors; never what was decoded from lossy codes."""
        if self._layout.fidelity is Fidelity.LOSSY:
            return self.originals(self._rows.ids[start:stop])
        return self._read(start, stop)

    def _verify(self, candidate: FaissStore) -> None:
        old, new = self._layout, candidate._layout
        if not np.array_equal(new.ids, old.ids) or new.root.ntotal != old.root.ntotal:
            raise VerificationError(
                f"{self._path}: {len(old)} rows went in and {len(new)} came out, or their ids "
                "differ (an IVF drops vectors that are not finite); nothing was changed"
            )
        if (new.kind, dict(new.details)) != (old.kind, dict(old.details)):
            raise VerificationError(
                f"{self._path}: {old.kind} {dict(old.details)} became {new.kind} "
                f"{dict(new.details)}; nothing was changed"
            )


def _lists_of(staged_copy: Path, kept: Path) -> ListFile | None:
    """Find the list file of a kept index where the index was, and see that both can be read."""
    try:
        return FaissStore(staged_copy, read_only=True)._lists
    except StoreError as error:
        raise StoreError(
            f"{error}; nothing was changed. Otherwise remove {kept} and run the command again: "
            "rows are then restored one by one"
        ) from error
