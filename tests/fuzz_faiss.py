"""Hunt for damaged FAISS files that crash, hang or take all memory; not part of `make test`.

    python tests/fuzz_faiss.py FOLDER [--minutes 20] [--seed 0]

Damages a small file of every kind in `benchmarks/faiss_cells.py` and opens, reads and searches it
in a child process. What is found is kept in FOLDER, and counted on stdout as JSON.

Where two files of a kind that hold other rows are equal, their bytes tell of the index's structure;
that is where most of the damage is done.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

import faiss
from damage import HARMLESS, MOST_BYTES, NUMBERS, Driver, put
from faiss_cells import CELLS, SMALL

Rng = np.random.Generator
Places = NDArray[np.int64]
Damage = Callable[[bytes, Places, Rng], bytes]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--only", default="", help="part of the names of the kinds")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(options.seed)
    whole = contents()
    names = [name for name in whole if options.only in name]
    counts: Counter[str] = Counter()
    end = time.monotonic() + 60 * options.minutes
    with Driver() as driver:
        while time.monotonic() < end:
            name = str(rng.choice(names))
            data, places = whole[name]
            for _ in range(rng.integers(1, 4)):
                data = DAMAGES[rng.integers(len(DAMAGES))](data, places, rng)
            path = options.folder / "tried.faiss"
            path.write_bytes(data)
            result = driver.open(path)
            outcome = result["outcome"]
            counts[outcome] += 1
            if outcome not in HARMLESS or result["grown"] >= MOST_BYTES:
                kept = options.folder / f"found-{sum(counts.values())}.faiss"
                path.rename(kept)
                sys.stdout.write(f"{name}: {outcome}, {result['grown'] >> 20} MiB: {kept}\n")
                sys.stdout.flush()
    total = {"seed": options.seed, "files": sum(counts.values()), **counts}
    sys.stdout.write(json.dumps(total) + "\n")


def contents() -> dict[str, tuple[bytes, Places]]:
    """Return a small file of each kind, and where its structure is."""
    faiss.omp_set_num_threads(1)
    rng = np.random.default_rng(0)
    rows, others = rng.standard_normal((2, SMALL.rows, SMALL.dim)).astype(np.float32)
    made = {}
    for cell in CELLS:
        data = faiss.serialize_index(cell.build(SMALL, rows))
        other = faiss.serialize_index(cell.build(SMALL, others))
        shared = min(len(data), len(other))
        made[cell.name] = data.tobytes(), np.flatnonzero(data[:shared] == other[:shared])
    return made


def number_in_the_structure(data: bytes, places: Places, rng: Rng) -> bytes:
    """Write a telling number over numbers of the structure."""
    return put(data, int(rng.choice(places)), _number(rng), int(rng.choice([1, 4, 8])))


def number_in_front(data: bytes, places: Places, rng: Rng) -> bytes:
    """Write a telling number over the first header."""
    return put(data, int(rng.integers(0, 150)), _number(rng), int(rng.choice([1, 4, 8])))


def flipped(data: bytes, places: Places, rng: Rng) -> bytes:
    """Change one byte anywhere."""
    return put(data, int(rng.integers(0, len(data) + 1)), int(rng.integers(0, 256)), 1)


def cut(data: bytes, places: Places, rng: Rng) -> bytes:
    """Lose the end."""
    return data[: rng.integers(0, len(data) + 1)]


def moved(data: bytes, places: Places, rng: Rng) -> bytes:
    """Lose or repeat some bytes, so that all others move."""
    at, width = int(rng.integers(0, len(data) + 1)), int(rng.integers(1, 32))
    return data[:at] + data[at + width :] if rng.random() < 0.5 else data[: at + width] + data[at:]


def _number(rng: Rng) -> int:
    if rng.random() < 0.5:
        return NUMBERS[rng.integers(len(NUMBERS))]
    return int(rng.integers(0, 600))


DAMAGES: list[Damage] = [*[number_in_the_structure] * 5, number_in_front, flipped, moved, cut]


if __name__ == "__main__":
    main()
