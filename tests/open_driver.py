"""Open files named on stdin, one a line, and say on stdout how it went; for test_faiss_hostile.py.

It runs in a process of its own, since a reader that a file can crash takes its process with it.
"""

from __future__ import annotations

import json
import resource
import sys
import warnings

import faiss
import numpy as np

from simskip_vdb.connectors import open_store
from simskip_vdb.errors import SimskipError


def main() -> None:
    faiss.omp_set_num_threads(1)
    # Damaged numbers may overflow; that is not what is looked for.
    warnings.simplefilter("ignore")
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (16 << 30, most))
    for line in sys.stdin:
        before = _peak()
        outcome = _open(line.strip())
        sys.stdout.write(json.dumps({"outcome": outcome, "grown": _peak() - before}) + "\n")
        sys.stdout.flush()


def _open(path: str) -> str:
    try:
        store = open_store(path, read_only=True)
        info = store.info()
        for batch in store.scan(100):
            store.fetch(batch.ids[:1])
        store.search(np.ones((2, info.dim), np.float32), 5, {})
    except SimskipError as error:
        return type(error).__name__
    return "opened"


def _peak() -> int:
    """Return the most memory that was ever resident, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
