"""Load measured sets: a folder with vectors and judgments or labels, or scikit-learn's digits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from simskip_vdb.datatypes import Positions, Vectors
from simskip_vdb.judgments import JudgmentFiles, Judgments, QuerySet, read_judgments
from simskip_vdb.parsing import Qrels, RowColumn

PROTOCOL = " (NUDGE's protocol)"
"""Ends the names of sets whose queries are pooled and shared out anew."""
DIGIT_ROWS = 1350  # of 1,797; the other 447 are test queries


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Dataset:
    """A set under one encoder.

    Attributes:
        name: Such as ``nfcorpus``.
        encoder: Such as ``minilm``.
        vectors: Unit rows, shape (n, d), float32.
        judgments: Queries with judgments, or labels, by split.
    """

    name: str
    encoder: str
    vectors: Vectors
    judgments: Judgments


def datasets(data: Path, wanted: list[str]) -> list[Dataset]:
    """Load every set below a folder, and the digits; `wanted` names some, empty for all."""
    folders = [path.parent for path in sorted(data.rglob("corpus.npy"))]
    names = {str(folder.relative_to(data)): folder for folder in folders}
    unknown = set(wanted) - set(names) - {"digits"}
    if unknown:
        raise SystemExit(f"no set {', '.join(sorted(unknown))} in {data}")
    found = [
        folder_set(folder, name) for name, folder in names.items() if not wanted or name in wanted
    ]
    return [*found, *([digits()] if not wanted or "digits" in wanted else [])]


def folder_set(folder: Path, name: str) -> Dataset:
    """Load a set; another encoder's folder shares its parent's ids and judgments."""
    base, _, encoder = name.partition("/")
    vectors = unit(np.load(folder / "corpus.npy").astype(np.float32))
    judgments = read_judgments(judgment_files(folder))
    return Dataset(name=base, encoder=encoder or "minilm", vectors=vectors, judgments=judgments)


def judgment_files(folder: Path) -> JudgmentFiles:
    """Name the files of a set: labels, or judgments with dev for selection where it exists."""
    if (folder / "labels.txt").exists():
        return JudgmentFiles(
            labels=folder / "labels.txt",
            test_queries=folder / "queries.test.npy",
            test_labels=folder / "query_labels.test.txt",
        )
    splits = [s for s in ("train", "dev", "test") if (folder / f"queries.{s}.npy").exists()]
    files = {"doc_ids": find(folder, "doc_ids.txt")}
    for split in splits:
        prefix = "" if split == splits[0] else f"{split}_"  # the first is fitted on
        files[f"{prefix}queries"] = find(folder, f"queries.{split}.npy")
        files[f"{prefix}query_ids"] = find(folder, f"query_ids.{split}.txt")
        files[f"{prefix}qrels"] = find(folder, f"qrels.{split}.tsv")
    return JudgmentFiles(**files)


def find(folder: Path, name: str) -> Path:
    """Return a file of a set or, for another encoder's folder, of its parent."""
    return folder / name if (folder / name).exists() else folder.parent / name


def digits() -> Dataset:
    """Load scikit-learn's handwritten digits, always shuffled the same way."""
    from sklearn.datasets import load_digits

    loaded = load_digits()
    order = np.random.default_rng(0).permutation(len(loaded.target))
    vectors = unit(loaded.data[order].astype(np.float32))
    labels = [str(label) for label in loaded.target[order]]
    test = QuerySet(
        option="--test-queries",
        ids=tuple(f"digit:{i}" for i in range(DIGIT_ROWS, len(labels))),
        vectors=vectors[DIGIT_ROWS:],
        labels=tuple(labels[DIGIT_ROWS:]),
    )
    column = RowColumn(source="digits", values=labels[:DIGIT_ROWS])
    judgments = Judgments(test=test, labels=column)
    return Dataset(
        name="digits", encoder="pixels", vectors=vectors[:DIGIT_ROWS], judgments=judgments
    )


def pooled(dataset: Dataset, seed: int) -> Dataset | None:
    """Share all judged queries out anew, 70 : 10 : 20, as NUDGE does (arXiv:2409.02343, section 4).

    Returns:
        The set under the name ``… (NUDGE's protocol)``; None where it has labels.
    """
    given = dataset.judgments
    if given.labels is not None:
        return None
    sets = [queries for queries in (given.queries, given.dev, given.test) if queries is not None]
    names = [name for queries in sets for name in queries.ids]
    vectors = np.concatenate([queries.vectors for queries in sets])
    judged = [queries.qrels for queries in sets if queries.qrels is not None]
    asked = np.array([name for qrels in judged for name in qrels.query_ids])
    rows = np.array([name for qrels in judged for name in qrels.doc_ids])
    grades = np.concatenate([qrels.grades for qrels in judged])
    order = np.random.default_rng(seed).permutation(len(names))
    ends = [round(share * len(names)) for share in (0.7, 0.8)]

    def part(option: str, places: Positions) -> QuerySet:
        ids = [names[place] for place in places]
        own = np.isin(asked, ids)
        return QuerySet(
            option=option,
            ids=tuple(ids),
            vectors=vectors[places],
            qrels=Qrels(
                source=f"{dataset.name}'s judgments",
                query_ids=asked[own].tolist(),
                doc_ids=rows[own].tolist(),
                grades=grades[own],
            ),
        )

    fit, validation, test = np.split(order, ends)
    judgments = replace(
        given,
        queries=part("--queries", fit),
        dev=part("--dev-queries", validation),
        test=part("--test-queries", test),
    )
    return replace(dataset, name=dataset.name + PROTOCOL, judgments=judgments)


def unit(x: Vectors) -> Vectors:
    """Return rows of length 1."""
    return np.asarray(x / np.linalg.norm(x, axis=1, keepdims=True), np.float32)
