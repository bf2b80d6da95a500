"""What a refined index needs later: its status, the way back, and the room that its state takes."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from simskip_vdb.attempts import Attempt
from simskip_vdb.datatypes import Progress, StoreInfo, silent
from simskip_vdb.durable import disk_errors, has_file, write_durably
from simskip_vdb.errors import ConfigError, MissingDependencyError
from simskip_vdb.journal import Journal
from simskip_vdb.ledger import Ledger
from simskip_vdb.logs import only_tells
from simskip_vdb.pages import render_markdown, render_page
from simskip_vdb.reindex import recover
from simskip_vdb.reindex import rollback as roll_back
from simskip_vdb.report import undo_command
from simskip_vdb.runs import Runs, record
from simskip_vdb.state_place import DIGITS, forget_elsewhere, state_folder
from simskip_vdb.store import VectorStore, abilities
from simskip_vdb.targets import holds

log = logging.getLogger(__name__)

PAGE = "report.html"


def rollback(
    store: VectorStore,
    *,
    state: Path | None = None,
    progress: Progress = silent,
    parts: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Restore the vectors that an index held before it was refined.

    Args:
        store: The index.
        state: Its state folder, if not the one beside it.
        progress: Called with (stage, done, total).
        parts: What else the run's record says (`runs.record`).

    Returns:
        index, exact, restored, kept, and the sha256 of a file or the digest of all rows.

    Raises:
        ConfigError: There is nothing to roll back.
        JournalError: The state is damaged, or which original belongs where is ambiguous.
    """
    folder, info = state_folder(store, state), store.info()
    known = _known(folder, info)
    start = time.perf_counter()
    with known as journal:
        journal.check_marker(store)
        recover(store, journal)
        done = roll_back(store, journal, progress)
        forget_elsewhere(info.state)
        counted = {"total": done.restored + done.kept, "new": 0, "changed": 0, "deleted": 0}
        found = record(
            "rollback",
            "restored",
            info.uri,
            rows={**counted, "written": done.restored},
            seconds={"write": time.perf_counter() - start},
            **(parts or {}),
        )
        with only_tells("the record of this run"):
            Runs(folder).add(found)
    return {
        "schema": 1,
        "index": info.uri,
        "exact": done.exact,
        "restored": done.restored,
        "kept": done.kept,
        "digest" if abilities(store).file is None else "sha256": done.fingerprint,
    }


def status(store: VectorStore, *, state: Path | None = None) -> dict[str, Any]:
    """Tell whether an index is refined, by what, since when, with what gain, and how to undo it.

    Args:
        store: The index.
        state: Its state folder, if not the one beside it.
    """
    info = store.info()
    folder = state_folder(store, state)
    known = has_file(folder / "manifest.json")
    journal = Journal(folder, info)
    current, pending = journal.manifest.current, journal.manifest.pending
    ledger = Ledger(folder)
    watch = None if current is None else ledger.watching(current.refiner)
    refined = None
    if current is not None:
        refined = {"refiner": current.refiner, "time": current.time, **current.summary}
    return {
        "schema": 1,
        "index": info.uri,
        "kind": info.kind,
        "rows": info.count,
        "dim": info.dim,
        "state": str(folder) if known else None,
        "state_bytes": journal.size if known else 0,
        "refined": refined,
        "state_of_another": journal.other or None,
        "copy_of": journal.manifest.copy_of,
        "interrupted": pending is not None,
        "partitions_written": 0 if pending is None else len(pending.partitions),
        "changed_since": current is not None and not holds(store, journal, current),
        "looks": ledger.looks,
        "live": None if watch is None else watch.to_dict(),
        "history": [dict(entry) for entry in journal.manifest.history],
        "undo": undo_command(info.uri) if refined and not journal.manifest.copy_of else None,
    }


def prune(
    store: VectorStore,
    *,
    state: Path | None = None,
    final: bool = False,
    runs: int | None = None,
    refiners: int | None = None,
) -> dict[str, Any]:
    """Remove from the state what is needed neither to go on nor to undo.

    These are refiners that were fitted and not written, and checkpoints of interrupted fits. With
    `final` the old index file goes as well: `rollback` then restores rows from their originals,
    which stay, instead of the very file. After a rollback `final` removes the originals, which
    stay until then: an application that still holds refined rows may save them once more.

    Args:
        store: The index.
        state: Its state folder, if not the usual one.
        final: Also remove the index file from before the first refinement.
        runs: How many records of runs to keep, the last ones; None for all.
        refiners: How many of the refiners that wrote the index before the current one to keep,
            the last ones; None for all. By an older one's, an application's late write of a row as
            it had read it would be taken for a new vector.

    Returns:
        index, removed (names), bytes (how many were freed), left (bytes that stay), notes.

    Raises:
        ConfigError: There is no state.
        JournalError: The state is damaged or in use.
    """
    folder, info = state_folder(store, state), store.info()
    known = _known(folder, info)
    with known as journal:
        recover(store, journal)
        before = journal.size
        if refiners is not None:
            journal.forget_history(refiners, runs)
        manifest = journal.manifest
        attempt = Attempt.load(folder)
        used = {write.refiner for write in (manifest.current, manifest.pending) if write}
        used |= {entry["refiner"] for entry in manifest.history}  # rows may come back as they were
        used |= set() if attempt is None else {attempt.refiner}  # new rows are compared with its
        unused = [path for path in sorted(journal.refiners.glob("*")) if path.name not in used]
        for path in unused:
            shutil.rmtree(path)
        removed = [f"refiners/{path.name}" for path in unused]
        if journal.fits.is_dir():
            shutil.rmtree(journal.fits)
            removed.append(journal.fits.name)
        if final:
            removed += journal.forget_kept()
            removed += _forget_digits(info) if journal.manifest.current is None else []
        if runs is not None:
            removed += Runs(folder).prune(runs)
        left = journal.size
    notes = []
    current = manifest.current
    if current is not None and current.origin:
        notes.append(
            f"the collection {current.origin!r} from before is yours: delete it when you will not "
            "go back to it"
        )
    return {
        "schema": 1,
        "index": info.uri,
        "removed": removed,
        "bytes": before - left,
        "left": left,
        "notes": notes,
    }


def _forget_digits(info: StoreInfo) -> list[str]:
    """Let go of the digits of originals that were brought back; return what was removed."""
    digits = None if info.state is None else info.state / DIGITS
    if digits is None or not digits.is_dir():
        return []
    with disk_errors(digits):
        shutil.rmtree(digits)
    return [digits.name]


def _known(folder: Path, info: StoreInfo) -> Journal:
    """Return the state of an index that has one.

    Raises:
        ConfigError: It has none.
        JournalError: It is damaged.
    """
    journal = Journal(folder, info)
    if not has_file(folder / "manifest.json"):
        raise ConfigError(
            f"{info.uri} was never refined: there is no state in {folder}; give the one that there "
            "is with --state, or refine it (simskip refine --help)"
        )
    return journal


def report(store: VectorStore, *, state: Path | None = None, markdown: bool = False) -> str:
    """Return the page about an index's last run, with the history of all; or a summary of it.

    Args:
        store: The index.
        state: Its state folder, if not the usual one.
        markdown: A short summary in Markdown, instead of a page of HTML.

    Raises:
        ConfigError: No run has left a record.
        JournalError: A record is damaged.
        MissingDependencyError: The extra ``report`` is not installed.
    """
    runs = Runs(state_folder(store, state)).read()
    if not runs:
        raise ConfigError(f"{store.info().uri}: no run has left a record to report about")
    return render_markdown(runs[-1]) if markdown else render_page(runs)


def leave_page(store: VectorStore, state: Path | None = None) -> None:
    """Put the page of `report` into the state folder, where its extra is installed."""
    with only_tells("the page about this run"):
        folder = state_folder(store, state)
        try:
            page = report(store, state=state)
        except (MissingDependencyError, ConfigError) as error:
            log.info("no page was left: %s", error)
            return
        write_durably(folder / PAGE, page.encode())
