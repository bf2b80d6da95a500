"""Refine real sets through the installed command, roll back, and write the numbers down.

    python benchmarks/sets.py [--data DIR] [--seeds 0,1,2] [SET…]

DIR holds one folder a set, with corpus.npy, doc_ids.txt, queries, qrels or labels. Each set becomes
an IVF Flat with custom ids, is refined, and is restored; the SHA-256 must come back.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import faiss
import machine
import numpy as np

from simskip_vdb.durable import sha256_of

HERE = Path(__file__).resolve().parent
KEPT = (
    *("kind", "rows", "dim", "metric", "side", "split", "queries", "measure", "measures"),
    *("strata", "through_index", "ann_recall", "late_rows", "group_overlap", "gate", "seconds"),
)
SIMSKIP = Path(sys.executable).with_name("simskip")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=HERE.parents[1] / "shared" / "data")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("sets", nargs="*")
    options = parser.parse_args()
    if not options.data.is_dir():
        sys.exit(f"no data at {options.data}; name the folder with --data DIR")
    folders = [path.parent for path in sorted(options.data.rglob("corpus.npy"))]
    results = []
    for folder in folders:
        name = str(folder.relative_to(options.data))
        if options.sets and name not in options.sets:
            continue
        for seed in map(int, options.seeds.split(",")):
            for side in ("docs", "both") if (folder / "labels.txt").exists() else ("docs",):
                result = run(folder, name, seed, side)
                results.append(result)
                print(row(result), flush=True)
    print(f"\nsaved {machine.save('sets', {'runs': results})}\n")
    print("| set | side | measure | before | after | 95 % interval | gate | fit seconds |")
    print("|---|---|---|---|---|---|---|---|")
    print("\n".join(row(result) for result in results))


def run(folder: Path, name: str, seed: int, side: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        path = build(folder, work)
        before = sha256_of(path)
        command = ["refine", str(path), *judgments(folder, work), "--seed", str(seed)]
        command += ["--search-params", "nprobe=16", "--side", side]
        if side == "both":
            command += ["--output", str(work / "both.faiss")]
        report = simskip(*command)
        if report["gate"]["passed"] and side == "docs":
            assert sha256_of(path) != before
            simskip("rollback", str(path))
        assert sha256_of(path) == before, f"{name}: the file is not what it was"
    kept = {name: report[name] for name in KEPT}
    return {"set": name, "seed": seed, "restored": True, **kept}


def build(folder: Path, work: Path) -> Path:
    vectors = np.load(folder / "corpus.npy").astype(np.float32)
    ids = np.random.default_rng(0).permutation(10 * len(vectors))[: len(vectors)]
    dim = vectors.shape[1]
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(dim), dim, 32, faiss.METRIC_INNER_PRODUCT)
    index.train(vectors)
    index.add_with_ids(vectors, ids)
    faiss.write_index(index, str(work / "index.faiss"))
    for source, target in (("doc_ids", "doc_ids"), ("labels", "labels")):
        if (found := find(folder, f"{source}.txt")) is not None:
            values = found.read_text().split("\n")
            lines = (f"{i}\t{value}\n" for i, value in zip(ids, values, strict=False))
            (work / f"{target}.tsv").write_text("".join(lines))
    return work / "index.faiss"


def judgments(folder: Path, work: Path) -> list[str]:
    if (folder / "labels.txt").exists():
        return [
            *("--labels", str(work / "labels.tsv")),
            *("--test-queries", str(folder / "queries.test.npy")),
            *("--test-labels", str(folder / "query_labels.test.txt")),
        ]
    splits = {
        split: f"--{split}-"
        for split in ("train", "dev", "test")
        if (folder / f"queries.{split}.npy").exists()
    }
    splits["train" if "train" in splits else "dev"] = "--"  # what is fitted on, split further
    options = ["--doc-ids", str(work / "doc_ids.tsv")]
    for split, prefix in splits.items():
        for option, file in (
            ("queries", f"queries.{split}.npy"),
            ("query-ids", f"query_ids.{split}.txt"),
            ("qrels", f"qrels.{split}.tsv"),
        ):
            options += [f"{prefix}{option}", str(find(folder, file))]
    return options


def find(folder: Path, name: str) -> Path | None:
    """Return a file of a set; another encoder's folder shares its parent's ids and judgments."""
    for place in (folder, folder.parent):
        if (place / name).exists():
            return place / name
    return None


def simskip(*arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        [str(SIMSKIP), *arguments, "--json"], capture_output=True, text=True, check=False
    )
    if done.returncode not in (0, 3):
        sys.exit(f"simskip {' '.join(arguments)}\n{done.stderr}")
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def row(result: dict[str, Any]) -> str:
    measure = result["measure"]
    found = result["measures"][measure]
    low, high = found["ci95"]
    where = "" if result["split"] == "test" else " (validation)"
    return (
        f"| {result['set']} | {result['side']} | {measure}{where} | {found['before']:.4f} | "
        f"{found['after']:.4f} | {low:+.4f} to {high:+.4f} | "
        f"{'passed' if result['gate']['passed'] else 'refused'} | "
        f"{result['seconds'].get('fit', 0):.0f} |"
    )


if __name__ == "__main__":
    main()
