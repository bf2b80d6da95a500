"""Kill refine and rollback over a Qdrant Edge shard at random moments, and look at what is left.

Run as a script: `python edge_kill_driver.py FOLDER SEED`. Each command runs in a forked child; this
process never opens the shard. Killed runs that are started again must end with the same vectors,
bit for bit, as a run that was never killed, and rollback must end with the originals.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import qdrant_edge as edge
from builders import random_refiner

import simskip_vdb as ss
from simskip_vdb.connectors.edge_store import EdgeStore
from simskip_vdb.datatypes import ID_TEXT, Metric
from simskip_vdb.judgments import Judgments

N, D, TRIALS = 4000, 24, 3

Command = Callable[[Path], None]


def main(folder: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    random_refiner(D, np.arange(N).astype(ID_TEXT), metric=Metric.COSINE).save(folder / "refiner")
    first = folder / "first"
    assert run(build, first) == 0
    originals = rows_of(first)
    never_killed = folder / "never-killed"
    shutil.copytree(first, never_killed)
    seconds = {}
    for command in (refine, rollback):
        start = time.monotonic()
        assert run(command, never_killed) == 0
        seconds[command] = time.monotonic() - start
        if command is refine:
            refined = rows_of(never_killed)
    assert not np.allclose(refined, originals, atol=1e-2)
    kills = {"refine": 0, "rollback": 0}
    for trial in range(TRIALS):
        path = folder / f"trial-{trial}"
        shutil.copytree(first, path)
        for command, expected in ((refine, refined), (rollback, originals)):
            for _ in range(2):
                after = rng.uniform(0.05, 0.9) * seconds[command]
                died = run(command, path, after) == -signal.SIGKILL
                kills[command.__name__] += died
                if not died:
                    break
            else:
                assert run(command, path) == 0, f"trial {trial} does not go on"
            found = rows_of(path)
            if command is refine:
                assert np.array_equal(found.view(np.uint32), expected.view(np.uint32))
            else:
                np.testing.assert_allclose(found, expected, atol=1e-6)
        shutil.rmtree(path)
    sys.stdout.write(json.dumps(kills))


def build(path: Path) -> None:
    path.mkdir()
    params = edge.EdgeVectorParams(D, edge.Distance.Cosine)
    shard = edge.EdgeShard.create(str(path), edge.EdgeConfig(vectors=params))
    vectors = np.random.default_rng(0).standard_normal((N, D)).tolist()
    points = [edge.Point(i, row) for i, row in enumerate(vectors)]
    shard.update(edge.UpdateOperation.upsert_points(points))
    shard.flush()
    shard.close()


def refine(path: Path) -> None:
    settings = ss.Settings(refiner=path.with_name("refiner"), accept_unmeasured=True)
    with EdgeStore(path) as store:
        report = ss.refine(store, Judgments(), settings)
    assert report.written is not None
    # A kill may come when all is done.
    assert (report.written["mode"], report.written["rows"]) in (("in-place", N), ("none", 0))


def rollback(path: Path) -> None:
    with EdgeStore(path) as store:
        if ss.status(store)["refined"] or ss.status(store)["interrupted"]:
            assert ss.rollback(store)["exact"]


def save_rows(path: Path) -> None:
    shard = edge.EdgeShard.load(str(path))
    records = shard.scroll(edge.ScrollRequest(limit=2 * N, with_vector=True))[0]
    rows = {int(str(record.id)): record.vector for record in records}
    assert len(records) == len(rows) == N
    np.save(path.with_name("rows.npy"), np.array([rows[i] for i in range(N)], np.float32))
    shard.close()


def rows_of(path: Path) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    assert run(save_rows, path) == 0, "the shard does not open"
    rows: np.ndarray[tuple[int, int], np.dtype[np.float32]]
    rows = np.load(path.with_name("rows.npy"))
    return rows


def run(command: Command, path: Path, kill_after: float | None = None) -> int:
    """Run a command in a child; return its exit status, negative where a signal ended it."""
    child = os.fork()
    if child == 0:
        try:
            command(path)
        except BaseException as error:
            sys.stderr.write(f"{command.__name__}: {error!r}\n")
            os._exit(1)
        os._exit(0)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
