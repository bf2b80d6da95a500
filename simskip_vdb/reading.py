"""The rows of a store, read once: their originals saved, and what is in them now remembered."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from simskip_vdb.datatypes import Progress, VectorBatch
from simskip_vdb.journal import Journal
from simskip_vdb.provenance import SCAN_ROWS, RowsInPlace, TrueRows
from simskip_vdb.register import Ours
from simskip_vdb.rows import row_digests, usable_vectors
from simskip_vdb.sending import Snapshot
from simskip_vdb.store import VectorStore, abilities


def read_rows(
    store: VectorStore,
    journal: Journal,
    ours: Ours | None,
    fields: Sequence[str],
    progress: Progress,
    *,
    keep: bool = True,
) -> Snapshot:
    """Save every row's original, in scan order; see `reindex.snapshot`.

    Args:
        store: The index, or a partition of it.
        journal: Receives the originals.
        ours: Tells which rows are ours; None where none is.
        fields: Payload columns to bring along.
        progress: Called with rows done and rows in all.
        keep: Whether originals are saved; else they are read again whenever they are needed.
    """
    total = store.info().count
    file = abilities(store).file
    sha256 = "" if file is None else file.sha256()
    true = TrueRows(store, ours)
    digests = [np.empty(0, np.uint64)]
    columns: dict[str, list[Any]] = {name: [] for name in fields}
    mine, usable = [np.empty(0, np.bool_)], [np.empty(0, np.bool_)]

    def originals() -> Iterator[VectorBatch]:
        done = 0
        for batch in store.scan(SCAN_ROWS, fields=fields):
            vectors, written = true.of(batch)
            yield VectorBatch(ids=batch.ids, vectors=vectors)
            digests.append(row_digests(batch.vectors))
            for name, column in columns.items():
                column.extend(batch.fields[name])
            mine.append(written)
            usable.append(usable_vectors(vectors))
            done += len(batch)
            progress("read", done, total)
        true.check()

    rows = journal.save_originals(originals()) if keep else RowsInPlace(store, true, originals())
    return Snapshot(
        rows,
        np.concatenate(digests),
        np.concatenate(mine),
        np.concatenate(usable),
        columns,
        sha256,
    )
