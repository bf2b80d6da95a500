"""Partitions of an index, read and written by workers in processes of their own.

The driver does what concerns all rows: it holds the lock, fits, asks the gate, announces the write
and settles it. A worker does for one partition what the local run does for the index, by the same
code: it saves the originals, later refines, writes and verifies, and leaves durable files in the
state folder, which the driver records. A worker that is lost is replaced, and its partition done
again; how far it came shows in the rows. A driver that is lost is replaced by the same command.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from simskip_vdb.datatypes import Mask, Progress, StoreInfo, Vectors, silent
from simskip_vdb.errors import ConfigError, MissingDependencyError, StoreError
from simskip_vdb.fence import at_work, send_out, shut_out
from simskip_vdb.journal import IN_PLACE, FileRef, Journal, ref_from
from simskip_vdb.outgoing import Written
from simskip_vdb.part_state import PartState
from simskip_vdb.provenance import AsRead
from simskip_vdb.reading import read_rows
from simskip_vdb.refiner import Refiner
from simskip_vdb.rows import Digests, Rows, fingerprint_of, together
from simskip_vdb.sending import Sending, Sent, Snapshot
from simskip_vdb.store import Partition, Partitioned, VectorStore, abilities
from simskip_vdb.targets import InPlace

LOCAL, RAY = "local", "ray"


class ReadJob(NamedTuple):
    """A partition to be read.

    Attributes:
        number: Which one.
        partition: Opens it.
        fields: Payload columns to bring along.
        token: Lets a worker in (see `fence`).
    """

    number: int
    partition: Partition
    fields: tuple[str, ...]
    token: str = ""


class ReadDone(NamedTuple):
    """What a `Snapshot` tells, but for the rows, which are in a file of the state."""

    originals: FileRef
    digests: Digests
    ours: Mask
    usable: Mask
    columns: Mapping[str, list[Any]]


class WriteJob(NamedTuple):
    """A partition to be written.

    Attributes:
        number: Which one.
        partition: Opens it.
        originals: Its originals.
        digests: Of its rows as they were read, shape (n,).
        late: Which of them the refiner treats as late, shape (n,).
        settled: Which of them are right already, shape (n,).
        token: Lets a worker in (see `fence`).
    """

    number: int
    partition: Partition
    originals: FileRef
    digests: Digests
    late: Mask
    settled: Mask
    token: str = ""


class Pool(Protocol):
    """Runs jobs on workers, several at a time."""

    def run(self, method: str, jobs: Sequence[Any], done: Callable[[Any, Any], None]) -> None:
        """Call a method of a `Worker` with each job; hand job and result over as they come.

        Raises:
            SimskipError: A job failed, when no other is under way any more.
            TransientStoreError: Workers were lost again and again.
        """
        ...


class Worker:
    """Reads and writes one partition at a time; the refiner is loaded once."""

    def __init__(self, folder: Path, info: StoreInfo) -> None:
        """Take the state folder, and the index."""
        self._folder, self._info = folder, info
        self._refiner: Refiner | None = None

    def read(self, job: ReadJob) -> ReadDone:
        """Save the originals of a partition."""
        with at_work(self._folder, job.token, job.number):
            state, store = self._state(job), job.partition.open()
            found = read_rows(store, state, state.ours(store), job.fields, silent)
        assert state.scanned is not None
        return ReadDone(state.scanned, *found[1:5])

    def write(self, job: WriteJob) -> Sent:
        """Refine, write and verify a partition, as the write that is announced says."""
        with at_work(self._folder, job.token, job.number):
            state = self._state(job)
            assert state.manifest.pending is not None
            refiner = self._load(state.refiners / state.manifest.pending.refiner)
            store, rows = job.partition.open(), Rows(state.path(job.originals))

            def refine(start: int, block: Vectors) -> Vectors:
                part = slice(start, start + len(block))
                return refiner.refine_rows(block, rows.ids[part], job.late[part])

            nothing = np.zeros(len(rows), np.bool_)
            found = Snapshot(rows, job.digests, nothing, nothing, {})
            read = AsRead(rows, job.digests, state, store)
            target = InPlace(store, state)
            return Sending(target, store, found, read, refine, silent, job.settled).run(state)

    def _state(self, job: ReadJob | WriteJob) -> PartState:
        return PartState(self._folder, self._info, job.number, job.partition.name)

    def _load(self, folder: Path) -> Refiner:
        if self._refiner is None or self._refiner.id != folder.name:
            self._refiner = Refiner.load(folder)
        return self._refiner


class Crew:
    """The driver's side: sends partitions out, and puts together what comes back."""

    def __init__(self, store: Partitioned, journal: Journal, pool: Pool) -> None:
        """Take the index, its state, locked, and who does the work."""
        self._store, self._journal, self._pool = store, journal, pool
        self._partitions = store.partitions()

    def read(self, fields: Sequence[str], progress: Progress) -> Snapshot:
        """Save every row's original, partition after partition; see `reindex.snapshot`."""
        jobs = [ReadJob(i, part, tuple(fields)) for i, part in enumerate(self._partitions)]
        found: dict[int, ReadDone] = {}

        def done(job: ReadJob, read: ReadDone) -> None:
            found[job.number] = read
            progress("read", len(found), len(jobs))

        self._run("read", jobs, done)
        parts = [found[i] for i in range(len(jobs))]
        return Snapshot(
            self._journal.adopt_originals([part.originals for part in parts]),
            np.concatenate([part.digests for part in parts]),
            np.concatenate([part.ours for part in parts]),
            np.concatenate([part.usable for part in parts]),
            {name: [v for part in parts for v in part.columns[name]] for name in fields},
        )

    def write(self, late: Mask, found: Snapshot, settled: Mask, progress: Progress) -> Sent:
        """Refine, write and verify every partition; skip those that an earlier run did.

        Args:
            late: Rows that the refiner treats as late, shape (n,).
            found: What `read` returned.
            settled: Rows that are right already, shape (n,).
            progress: Called with rows done and rows in all.
        """
        jobs, before = self._jobs(late, found, settled)
        sent = dict(before)

        def done(job: WriteJob, part: Sent) -> None:
            sent[job.number] = part
            self._journal.note_partition(job.partition.name, _record(part, job.late))
            rows = sum(len(j.late) for j in jobs if j.number in sent)
            progress("write", len(late) - sum(len(j.late) for j in jobs) + rows, len(late))

        try:
            self._run("write", jobs, done)
        except Exception:
            with suppress(StoreError):  # what went wrong first is told
                self._store.reopen()
            raise
        self._store.reopen()
        parts = [sent[i] for i in range(len(self._partitions))]
        return Sent(
            FileRef.of_parts([part.written for part in parts]),
            together(part.fingerprint for part in parts),
            _sum([part.outcome for part in parts]),
        )

    def _run(self, method: str, jobs: Sequence[Any], done: Callable[[Any, Any], None]) -> None:
        """Have jobs done; no worker, lost ones included, writes anything after that."""
        folder = self._journal.folder
        token = send_out(folder)
        try:
            self._pool.run(method, [job._replace(token=token) for job in jobs], done)
        except Exception:
            shut_out(folder)
            raise
        shut_out(folder)

    def _jobs(
        self, late: Mask, found: Snapshot, settled: Mask
    ) -> tuple[list[WriteJob], dict[int, Sent]]:
        """Return what is to be written, and what was written and still is there."""
        scanned, pending = self._journal.scanned, self._journal.manifest.pending
        assert scanned is not None
        assert pending is not None
        edges = pairwise(accumulate((ref.rows for ref in scanned.files), initial=0))
        jobs, before = [], {}
        for number, (partition, ref, edge) in enumerate(
            zip(self._partitions, scanned.files, edges, strict=True)
        ):
            part = slice(*edge)
            record = pending.partitions.get(partition.name)
            now = fingerprint_of(found.rows.ids[part], found.digests[part])
            if record is not None and _holds(record, now, late[part]):
                before[number] = _recorded(record)
            else:
                digests = found.digests[part]
                jobs.append(WriteJob(number, partition, ref, digests, late[part], settled[part]))
        return jobs, before


def check_executor(executor: str, store: VectorStore, mode: str) -> None:
    """Make sure that an executor can work on a store.

    Raises:
        ConfigError: It cannot.
        MissingDependencyError: Its package is not installed.
    """
    if executor == LOCAL:
        return
    if executor != RAY:
        raise ConfigError(f"there is no executor '{executor}'; there are {LOCAL} and {RAY}")
    parted = abilities(store).partitions
    if parted is None:
        raise ConfigError(
            f"{store.info().uri} is one piece, and --executor ray shares partitions out: several "
            "FAISS files ('FOLDER/part*.faiss'), a folder of Parquet files, or a Qdrant server"
        )
    parted.partitions()
    if mode != IN_PLACE:
        raise ConfigError(f"--executor ray writes in place, not by --mode {mode}")
    if importlib.util.find_spec("ray") is None:
        raise MissingDependencyError("ray", "ray")


@contextmanager
def ray_crew(store: VectorStore, journal: Journal) -> Iterator[Crew]:
    """Gather a crew on the Ray cluster that `RAY_ADDRESS` names; without one, on this machine.

    Args:
        store: The index; see `check_executor`.
        journal: Its state, locked, in a folder that every machine of the cluster sees.
    """
    from simskip_vdb.ray_pool import RayPool

    parted = abilities(store).partitions
    assert parted is not None
    journal.begin()
    arguments = (journal.folder.resolve(), store.info())
    with RayPool(Worker, arguments, most=len(parted.partitions())) as pool:
        yield Crew(parted, journal, pool)


def _record(sent: Sent, late: Mask) -> dict[str, Any]:
    return {"late": _digest(late), **sent._asdict(), "written": asdict(sent.written),
            "outcome": asdict(sent.outcome)}  # fmt: skip


def _recorded(record: Mapping[str, Any]) -> Sent:
    written = ref_from(record["written"])
    assert written is not None
    outcome = replace(Written(**record["outcome"]), sent=0)
    return Sent(written, record["fingerprint"], outcome)


def _holds(record: Mapping[str, Any], now: str, late: Mask) -> bool:
    """Tell whether a partition is as it was when it was verified, and should be."""
    return bool(record["fingerprint"] == now and record["late"] == _digest(late))


def _digest(mask: Mask) -> str:
    return hashlib.sha256(np.packbits(mask).tobytes()).hexdigest()


def _sum(parts: Sequence[Written]) -> Written:
    counts = {
        name: sum(getattr(part, name) for part in parts)
        for name in ("rows", "skipped", "theirs", "gone", "sent")
    }
    return Written(mode=IN_PLACE, **counts)
