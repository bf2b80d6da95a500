"""Kill a run at every durable operation, one after the other, and look at what is left.

Run as a script: `python crash_driver.py FOLDER`. Each command runs in a forked child that is killed
(SIGKILL) just before, then just after, its k-th operation on the disk, for every k until it ends by
itself. After each kill the index must open and hold the old rows or the new rows, whole; the same
command must end where a run that was never killed ends; and rollback must restore the first file,
and leave no file behind. All this twice: with lists in the index, and in a file of their own.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path

import numpy as np
from builders import ivf, random_refiner
from faiss_files import put_lists_on_disk, read

from simskip_vdb.connectors.faiss_store import FaissStore
from simskip_vdb.durable import sha256_of
from simskip_vdb.journal import Journal
from simskip_vdb.reindex import recover, rollback, snapshot, write
from simskip_vdb.rows import row_digests

OPERATIONS = ("replace", "link", "fsync", "unlink", "mkdir", "chmod")
N, D = 200, 8

Command = Callable[[Path], None]


def main(folder: Path) -> None:
    rng = np.random.default_rng(0)
    ids = np.sort(rng.choice(10**6, N, replace=False))
    first = folder / "first" / "x.faiss"
    first.parent.mkdir()
    ivf(first, ids, rng.normal(size=(N, D)).astype(np.float32))
    outside = folder / "outside" / "x.faiss"
    outside.parent.mkdir()
    # Named as FAISS's own examples do; found beside the index, since it is not here.
    put_lists_on_disk(read(first), outside, "lists")
    refiners = [random_refiner(D, ids, seed) for seed in range(2)]

    def refine(which: int) -> Command:
        def run(path: Path) -> None:
            store = FaissStore(path)
            with Journal(state_of(path), store.info()) as journal:
                recover(store, journal)
                current = journal.manifest.current
                if current is not None and current.refiner == refiners[which].id:
                    return
                refiners[which].save(journal.refiners / refiners[which].id)
                found = snapshot(store, journal)
                write(
                    store,
                    found,
                    lambda at, x: refiners[which].refine_rows(x, found.rows.ids[at : at + len(x)]),
                    journal=journal,
                    refiner=refiners[which],
                    accept=lambda candidate: None,
                    summary={},
                )

        return run

    def undo(path: Path) -> None:
        store = FaissStore(path)
        with Journal(state_of(path), store.info()) as journal:
            recover(store, journal)
            if journal.manifest.current is not None:
                rollback(store, journal)

    chains: dict[str, list[Command]] = {
        "first refine": [refine(0)],
        "second refine": [refine(0), refine(1)],
        "rollback": [refine(0), undo],
    }
    import_what_is_loaded_late(folder / "warm" / "x.faiss", first, chains["rollback"])
    counts = {f"{name} {index.parent.name}": probe(folder / name / index.parent.name, index, chain,
              undo) for name, chain in chains.items() for index in (first, outside)}  # fmt: skip
    (folder / "kills.json").write_text(json.dumps(counts))  # FAISS itself writes to stdout


def import_what_is_loaded_late(path: Path, first: Path, chain: list[Command]) -> None:
    """Import what commands import, so that no child has to; threads of theirs survive no fork."""
    names = path.with_name("modules.json")

    def tell(path: Path) -> None:
        for command in chain:
            command(path)
        names.write_text(json.dumps(sorted(sys.modules)))

    copy_index(first, path)
    assert run(tell, path) == 0
    for name in json.loads(names.read_text()):
        with suppress(ImportError):
            import_module(name)


def probe(folder: Path, first: Path, chain: list[Command], undo: Command) -> int:
    """Kill the last command of a chain everywhere; return how many kills it survived."""
    start = folder / "start" / "x.faiss"
    copy_index(first, start)
    for command in chain[:-1]:
        assert run(command, start) == 0
    end = folder / "end" / "x.faiss"
    copy_index(start, end)
    assert run(chain[-1], end) == 0
    old, new = rows_of(start), rows_of(end)
    assert old != new
    kills = 0
    for after in (False, True):
        at = 0
        while True:
            path = folder / f"kill-{at}-{after}" / "x.faiss"
            copy_index(start, path)
            if run(chain[-1], path, kill_at=at, after=after) == 0:
                break
            kills += 1
            found = rows_of(path)
            assert found in (old, new), f"rows are mixed after kill {at}, after={after}"
            assert run(chain[-1], path) == 0, f"does not resume after kill {at}, after={after}"
            assert rows_of(path) == new, f"ends elsewhere after kill {at}, after={after}"
            assert run(undo, path) == 0
            assert sha256_of(path) == sha256_of(first), f"not restored: kill {at}, after={after}"
            assert names_in(path.parent) == sorted([*names_in(first.parent), "x.faiss.simskip"])
            assert all(sha256_of(path.with_name(name)) == sha256_of(first.with_name(name))
                       for name in names_in(first.parent))  # fmt: skip
            shutil.rmtree(path.parent)
            at += 1
    return kills


def run(command: Command, path: Path, kill_at: int | None = None, after: bool = False) -> int:
    """Run a command in a child; return its exit status."""
    child = os.fork()
    if child == 0:
        if kill_at is not None:
            kill_at_operation(kill_at, after)
        try:
            command(path)
        except BaseException as error:
            sys.stderr.write(f"{error!r}\n")
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return -signal.SIGKILL
    return os.waitstatus_to_exitcode(status)


def kill_at_operation(number: int, after: bool) -> None:
    """Make the `number`-th durable operation of this process its last."""
    seen = 0

    def deadly(operation: Callable[..., object]) -> Callable[..., object]:
        def wrapped(*args: object, **kwargs: object) -> object:
            nonlocal seen
            mine, seen = seen, seen + 1
            if mine == number and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = operation(*args, **kwargs)
            if mine == number and after:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return wrapped

    for name in OPERATIONS:
        setattr(os, name, deadly(getattr(os, name)))


def rows_of(path: Path) -> dict[int, int]:
    batches = list(FaissStore(path).scan(64))
    ids = np.concatenate([batch.ids for batch in batches])
    digests = np.concatenate([row_digests(batch.vectors) for batch in batches])
    rows = dict(zip(ids.tolist(), digests.tolist(), strict=True))
    assert len(rows) == len(ids) == N
    return rows


def copy_index(source: Path, target: Path) -> None:
    shutil.copytree(source.parent, target.parent)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def state_of(path: Path) -> Path:
    return path.with_name(path.name + ".simskip")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
