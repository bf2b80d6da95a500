"""A small index with judgments on disk, for tests of the whole job."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from builders import clusters, ivf

from simskip_vdb.judgments import JudgmentFiles

ROWS, QUERIES, DIM = 400, 300, 16


@dataclass
class Case:
    """Paths of an index and its judgments."""

    folder: Path
    index: Path
    files: JudgmentFiles
    labels: JudgmentFiles

    @property
    def options(self) -> list[str]:
        """The judgments as command-line options."""
        return [
            *("--queries", str(self.files.queries), "--query-ids", str(self.files.query_ids)),
            *("--qrels", str(self.files.qrels), "--doc-ids", str(self.files.doc_ids)),
        ]


def make_case(folder: Path, *, seed: int = 0, gain: bool = True) -> Case:
    """Write an IVF with custom ids, and queries whose relevant rows are those of their group.

    With `gain`, queries are displaced from their group's rows, which a refiner can undo. Without,
    which rows are relevant is drawn by lot, so nothing can be learnt.
    """
    rng = np.random.default_rng(seed)
    docs, queries, row_group, query_group = clusters(rng, ROWS, QUERIES, DIM)
    ids = np.sort(rng.choice(10_000, ROWS, replace=False))
    folder.mkdir(parents=True, exist_ok=True)
    index = ivf(folder / "index.faiss", ids, docs)
    np.save(folder / "q.npy", queries.astype(np.float16))
    (folder / "q.txt").write_text("".join(f"q{i}\n" for i in range(QUERIES)))
    (folder / "ids.tsv").write_text("".join(f"{row}\tdoc-{n}\n" for n, row in enumerate(ids)))
    (folder / "labels.tsv").write_text(
        "".join(f"{row}\t{group}\n" for row, group in zip(ids, row_group, strict=True))
    )
    judged = query_group if gain else rng.permutation(query_group)
    lines = ["query-id\tcorpus-id\tscore\n"]
    for query, group in enumerate(judged):
        relevant = np.flatnonzero(row_group == group)
        lines += [f"q{query}\tdoc-{row}\t1\n" for row in relevant]
    (folder / "qrels.tsv").write_text("".join(lines))
    return Case(
        folder=folder,
        index=index,
        files=JudgmentFiles(
            queries=folder / "q.npy",
            query_ids=folder / "q.txt",
            qrels=folder / "qrels.tsv",
            doc_ids=folder / "ids.tsv",
        ),
        labels=JudgmentFiles(labels=folder / "labels.tsv"),
    )
