"""Kill refine and rollback at random instants, hundreds of times a store: what is lost?

    python benchmarks/crashes.py [--kills 300] [--seed 0] [--only NAME] [--save FILE]

A killed run of `simskip refine INDEX --refiner DIR --accept-unmeasured` leaves an index that is
looked at by the bare engine: it opens and answers, every id is there once, every vector is the one
from before or the refined one. Then the same command, or `simskip rollback`, is run until it ends,
killed again on the way or not, and must end where a run ends that was never killed. Instants are
spread evenly over the time that an undisturbed run takes. A kill is no power cut: what a process
wrote, the system still has.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):  # a fork keeps no thread
    os.environ[_name] = "1"

import machine  # noqa: E402
import numpy as np  # noqa: E402
from killing import KINDS, Campaign, table  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=300, help="Of refine, for each store.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="One store, by its name.")
    parser.add_argument("--save", type=Path, help="Instead of benchmarks/results/crashes.json.")
    options = parser.parse_args()
    stores = {}
    for number, kind in enumerate(KINDS):
        if options.only in (None, kind.name):
            stores[kind.name] = measure(number, options)
            print(json.dumps({kind.name: stores[kind.name]}), file=sys.stderr)
    result = {"seed": options.seed, "stores": stores}
    if options.save is None:
        print(f"saved {machine.save('crashes', result)}")
    else:
        options.save.write_text(json.dumps(result))
    print(table(stores))
    return int(any(store["failures"] for store in stores.values()))


def measure(number: int, options: argparse.Namespace) -> dict[str, Any]:
    """Kill one kind of store; in memory where there is such a folder, for the speed."""
    kind = KINDS[number]
    memory = Path("/dev/shm")
    start = time.monotonic()
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as temporary:
        rng = np.random.default_rng([options.seed, number])
        campaign = Campaign(kind, Path(temporary) / "work", rng)
        outcome = campaign.run(options.kills)
    return {
        "rows": kind.rows,
        "dim": kind.dim,
        **asdict(outcome),
        "undisturbed_seconds": campaign.seconds,
        "seconds": time.monotonic() - start,
    }


if __name__ == "__main__":
    sys.exit(main())
