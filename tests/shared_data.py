"""Find the measured sets beside the repository, and skip visibly where they are not."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from simskip_vdb.datatypes import Ids, Positions, Vectors
from simskip_vdb.judgments import JudgmentFiles

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@dataclass
class Rows:
    """Rows in memory, in scan order."""

    ids: Ids
    vectors: Vectors

    def __post_init__(self) -> None:
        self.dim = self.vectors.shape[1]

    def take(self, positions: Positions, /) -> Vectors:
        return self.vectors[positions]


def corpus(name: str) -> Rows:
    vectors = np.load(folder(name) / "corpus.npy").astype(np.float32)
    return Rows(np.arange(len(vectors)), vectors)


def folder(name: str) -> Path:
    if not (DATA / name).is_dir():
        pytest.skip(f"the measured set {name} is not at {DATA}")
    return DATA / name


def judged_files(name: str, *splits: str) -> JudgmentFiles:
    """Name the files of a set's splits, train as queries to be split."""
    at = folder(name)
    paths = {"doc_ids": at / "doc_ids.txt"}
    for split in splits:
        prefix = "" if split == "train" else f"{split}_"
        paths[f"{prefix}queries"] = at / f"queries.{split}.npy"
        paths[f"{prefix}query_ids"] = at / f"query_ids.{split}.txt"
        paths[f"{prefix}qrels"] = at / f"qrels.{split}.tsv"
    return JudgmentFiles(**paths)
