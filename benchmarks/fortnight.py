"""Look after a growing Qdrant Edge shard for a fortnight, and check every promise every night.

    python benchmarks/fortnight.py [--rows 100000] [--nights 14] [--seed 0] [--keep DIR]

Each day the application adds 2 % of rows (from the seventh on, drifted ones), changes some and
deletes some, and click logs land. Each night `simskip nightly` runs as a process of its own; in
some nights it is killed by SIGKILL at a random instant and called again. One night brings
judgments by lot, and one day somebody rolls back. What the shard must hold is kept beside it in
numpy. Prints the fortnight as a table, saves results/fortnight.json, and exits with 1 if any
promise was broken.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import machine
import numpy as np
import qdrant_edge as edge
from numpy.typing import NDArray

from simskip_vdb.refiner import Refiner
from simskip_vdb.report import table
from simskip_vdb.rows import row_digests

SIMSKIP = Path(sys.executable).with_name("simskip")
DIM, GROUPS, POPULAR, CLICKED = 64, 300, 12, 8
GROWTH, CHANGED, DELETED = 0.02, 0.002, 0.001
DRIFTS_FROM, BY_LOT, ROLLED_BACK = 7, 9, 11
KILLED = (3, 6, 12)
FIRST_QUERIES, QUERIES_A_DAY, LOT_QUERIES = 900, 60, 400
JOBS = """\
[jobs.shard]
index = "qdrant-edge:shard"
judgments = "clicks"
doc_id_field = "sku"
device = "cpu"
refit.new_judgments = 0.25
retention.runs = 60
"""
Vectors = NDArray[np.float32]


class World:
    """The application: its shard, what the shard must hold, and the people who click."""

    def __init__(self, folder: Path, rows: int, seed: int) -> None:
        self.folder, self.rng = folder, np.random.default_rng(seed)
        self.centres = self.rng.normal(size=(GROUPS, DIM))
        self.shift, self.drift = self.rng.normal(size=(2, DIM))
        self.truth: dict[int, Vectors] = {}
        self.group: dict[int, int] = {}
        self.payload: dict[int, dict[str, Any]] = {}
        self.next_row = self.next_query = 0
        params = {"": edge.EdgeVectorParams(DIM, edge.Distance.Dot)}
        self.shard_path = folder / "shard"
        self.shard_path.mkdir()
        edge.EdgeShard.create(str(self.shard_path), edge.EdgeConfig(vectors=params)).close()
        (folder / "clicks").mkdir()
        (folder / "jobs.toml").write_text(JOBS)
        self.add(rows, drifted=False)
        self.click(FIRST_QUERIES)

    @contextmanager
    def shard(self) -> Iterator[edge.EdgeShard]:
        shard = edge.EdgeShard.load(str(self.shard_path))
        try:
            yield shard
            shard.flush()
        finally:
            shard.close()

    def add(self, count: int, *, drifted: bool) -> None:
        groups = self.rng.integers(0, GROUPS, count)
        spread = self.centres[groups] + 0.5 * self.rng.normal(size=(count, DIM))
        rows = unit(spread + (1.5 * self.drift if drifted else 0))
        ids = np.arange(self.next_row, self.next_row + count).tolist()
        self.next_row += count
        self.group |= dict(zip(ids, groups.tolist(), strict=True))
        self.payload |= {row: {"sku": f"doc-{row}"} for row in ids}
        self.put(ids, rows)

    def put(self, ids: list[int], rows: Vectors) -> None:
        self.truth |= dict(zip(ids, rows, strict=True))
        with self.shard() as shard:
            for start in range(0, len(ids), 2000):
                part = range(start, min(start + 2000, len(ids)))
                points = [
                    edge.Point(ids[i], {"": rows[i].tolist()}, self.payload[ids[i]]) for i in part
                ]
                shard.update(edge.UpdateOperation.upsert_points(points))

    def day(self, night: int) -> None:
        """Add, change and delete rows, and click."""
        count = len(self.truth)
        drifted = night >= DRIFTS_FROM
        self.add(int(count * GROWTH), drifted=drifted)
        ids = self.rng.permutation(list(self.truth))[: int(count * (CHANGED + DELETED))].tolist()
        changed, gone = ids[: int(count * CHANGED)], ids[int(count * CHANGED) :]
        self.put(changed, unit(self.rng.normal(size=(len(changed), DIM))))
        with self.shard() as shard:
            shard.update(edge.UpdateOperation.delete_points(gone))
        for row in gone:
            del self.truth[row], self.group[row], self.payload[row]
        self.click(QUERIES_A_DAY)

    def click(self, count: int, *, by_lot: bool = False) -> Path:
        """Let people ask and click what is popular; by lot, of another group than the query's."""
        members: dict[int, list[int]] = {}
        for row, group in self.group.items():
            members.setdefault(group, []).append(row)
        lines = []
        for _ in range(count):
            group = int(self.rng.choice(list(members)))
            asked = self.centres[group] + self.shift + 0.5 * self.rng.normal(size=DIM)
            vector = unit(asked[None])[0].tolist()
            source = int(self.rng.choice(list(members))) if by_lot else group
            docs = self.rng.permutation(sorted(members[source])[:POPULAR])[:CLICKED].tolist()
            name = f"q{self.next_query}"
            self.next_query += 1
            lines.append(
                json.dumps({"id": name, "vector": vector, "docs": [f"doc-{doc}" for doc in docs]})
            )
        path = self.folder / "clicks" / f"{self.next_query:06d}.jsonl"
        path.write_text("\n".join(lines) + "\n")
        return path

    def held(self) -> tuple[NDArray[np.int64], Vectors, dict[int, dict[str, Any]]]:
        """Read the shard without the code under test."""
        ids, rows, payload = [], [], {}
        with self.shard() as shard:
            offset = None
            while True:
                request = edge.ScrollRequest(
                    limit=10_000, offset=offset, with_payload=True, with_vector=True
                )
                records, offset = shard.scroll(request)
                for record in records:
                    ids.append(int(record.id))
                    vector = record.vector
                    rows.append(vector[""] if isinstance(vector, dict) else vector)
                    payload[int(record.id)] = dict(record.payload or {})
                if offset is None:
                    break
        return np.array(ids), np.array(rows, np.float32), payload

    @property
    def state(self) -> Path:
        return self.folder / "shard.simskip" / "unnamed"


def unit(x: NDArray[Any]) -> Vectors:
    return np.asarray(x / np.linalg.norm(x, axis=1, keepdims=True), np.float32)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--nights", type=int, default=14)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="Keep the shard and its state in this folder.")
    parser.add_argument("--save", type=Path, help="Instead of benchmarks/results/fortnight.json.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(exist_ok=True)
        world = World(folder, options.rows, options.seed)
        nights = [live(world, night) for night in range(1, options.nights + 1)]
        finish(world, nights[-1])
        state_bytes = sum(p.stat().st_size for p in world.state.rglob("*") if p.is_file())
    result = {
        "rows": options.rows,
        "dim": DIM,
        "seed": options.seed,
        "nights": nights,
        "state_bytes": state_bytes,
        "broken": [f"night {n['night']}: {what}" for n in nights for what in n["broken"]],
    }
    if options.save is None:
        print(f"saved {machine.save('fortnight', result)}")
    else:
        options.save.write_text(json.dumps(result))
    print(shown(nights))
    print(*(result["broken"] or ["every promise was kept"]), sep="\n")
    return int(bool(result["broken"]))


def live(world: World, night: int) -> dict[str, Any]:
    """Live one day and one night, and return what happened and which promises were broken."""
    lot = None
    if night > 1:
        world.day(night)
    if night == BY_LOT:
        lot = world.click(LOT_QUERIES, by_lot=True)
    broken = []
    if night == ROLLED_BACK:
        simskip("rollback", "qdrant-edge:shard", cwd=world.folder)
        broken += [f"after the rollback, {what}" for what in unlike(world, None)]
    before = refiner_of(world)
    kills = 0
    start = time.perf_counter()
    if night in KILLED:
        kills = killed(world)
    code, found = nightly(world)
    seconds = time.perf_counter() - start
    if code not in (0, 3):
        broken.append(f"the night ended with {code}: {found['messages']}")
    after = refiner_of(world)
    broken += unlike(world, after)
    if lot is not None:
        if found["outcome"] != "kept" or (before and after and before.id != after.id):
            broken.append(f"judgments by lot changed the refiner ({found['outcome']})")
        lot.unlink()
    again, quiet = nightly(world)
    # Where a file of judgments was removed, or a refiner was rolled back, this holds as well.
    if again != 0 or quiet["outcome"] != "quiet" or (quiet["rows"] or {}).get("written"):
        broken.append(f"the same command again: {quiet['outcome']}")
    return {
        "night": night,
        "rows": len(world.truth),
        "outcome": found["outcome"],
        "exit_code": code,
        "kills": kills,
        "counted": found["rows"],
        "measure": found["measure"],
        "messages": found["messages"],
        "drift": found["drift"],
        "refiner": None if after is None else after.id,
        "seconds": round(seconds, 1),
        "broken": broken,
    }


def nightly(world: World) -> tuple[int, dict[str, Any]]:
    done = simskip("nightly", "jobs.toml", "--json", cwd=world.folder, check=False)
    if not done.stdout:
        raise RuntimeError(done.stderr)
    return done.returncode, json.loads(done.stdout)["jobs"][0]


def killed(world: World) -> int:
    """Kill a night at random instants, three times, and look at what it leaves."""
    kills = 0
    for _ in range(3):
        child = subprocess.Popen(
            [SIMSKIP, "nightly", "jobs.toml"],
            cwd=world.folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            child.wait(float(world.rng.uniform(1, 15)))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
            kills += 1
        ids, rows, _ = world.held()
        if len(ids) != len(world.truth) or not np.isfinite(rows).all():
            raise RuntimeError("a killed night lost rows")
    return kills


def refiner_of(world: World) -> Refiner | None:
    manifest = world.state / "manifest.json"
    if not manifest.is_file():
        return None
    current = json.loads(manifest.read_bytes())["current"]
    return None if current is None else Refiner.load(world.state / "refiners" / current["refiner"])


def unlike(world: World, refiner: Refiner | None) -> list[str]:
    """Say in what the shard differs from what it must hold."""
    ids, rows, payload = world.held()
    if sorted(ids.tolist()) != sorted(world.truth):
        return ["rows were lost, doubled or made up"]
    broken = [] if payload == world.payload else ["payloads changed"]
    originals = np.array([world.truth[row] for row in ids.tolist()], np.float32)
    if refiner is None:
        return broken + ([] if np.array_equal(rows, originals) else ["originals are not back"])
    names = np.array([str(row) for row in ids.tolist()], "S44")
    known = {
        name.decode(): digest for name, digest in zip(*known_rows(world, refiner), strict=True)
    }
    digests = row_digests(originals)
    late = np.array(
        [known.get(str(row)) != digest for row, digest in zip(ids.tolist(), digests, strict=True)]
    )
    expected = refiner.refine_rows(originals, names, late)
    wrong = ~np.isclose(rows, expected, rtol=0, atol=1e-6).all(axis=1)
    if wrong.any():
        broken.append(f"{int(wrong.sum()):,} rows are neither late nor refined as they should be")
    return broken


def known_rows(world: World, refiner: Refiner) -> tuple[Any, Any]:
    import pyarrow as pa

    with pa.OSFile(str(world.state / "refiners" / refiner.id / "known.arrow")) as source:
        known = pa.ipc.open_file(source).read_all()
    ids = [name.encode() for name in known["id"].to_pylist()]
    return ids, known["digest"].to_numpy()


def finish(world: World, last: dict[str, Any]) -> None:
    """Build the report of the fortnight, and go back to the originals at the end."""
    page = world.folder / "report.html"
    simskip("report", "qdrant-edge:shard", "--out", page, cwd=world.folder)
    if "<script" in page.read_text() or "shard" not in page.read_text():
        last["broken"].append("the report is not what it should be")
    shutil.copy(page, Path(tempfile.gettempdir()) / "fortnight.html")
    if refiner_of(world) is None:
        last["broken"].append("nothing was ever refined")
        return
    simskip("rollback", "qdrant-edge:shard", cwd=world.folder)
    last["broken"] += [f"at the end, {what}" for what in unlike(world, None)]


def simskip(*arguments: object, cwd: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    command = [str(SIMSKIP), *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise RuntimeError(done.stderr)
    return done


def shown(nights: list[dict[str, Any]]) -> str:
    rows = []
    for night in nights:
        counted, measure = night["counted"] or {}, night["measure"]
        rows.append(
            (
                str(night["night"]),
                night["outcome"],
                f"{night['rows']:,}",
                *(f"{counted.get(name, 0):,}" for name in ("new", "changed", "deleted", "written")),
                "" if measure is None else f"{measure['before']:.4f} → {measure['after']:.4f}",
                str(night["kills"] or ""),
                night["refiner"] or "",
                f"{night['seconds']:.0f}",
            )
        )
    header = (
        *("night", "outcome", "rows", "new", "changed", "deleted", "written"),
        *("nDCG@10", "kills", "refiner", "seconds"),
    )
    return table(header, rows)


if __name__ == "__main__":
    sys.exit(main())
