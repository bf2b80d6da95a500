"""A mistake at the command line is answered with what to type next."""

from __future__ import annotations

import re
from pathlib import Path

import faiss
import numpy as np
import pytest
from click.testing import CliRunner

from simskip_vdb.cli import cli

NEXT = re.compile(
    r"--[a-z-]+|simskip [a-z]+|did you mean|look with: ls|known: |are .* right|or lines",
    re.IGNORECASE,
)
MISTAKES = {
    "a name that is nearly right": "inspect {at}/a.fais",
    "a name that is nothing's": "inspect {at}/zzzzzzzz",
    "a folder that is not there": "inspect {at}/none/a.faiss",
    "a pattern that fits nothing": "inspect {at}/zz*.faiss",
    "a folder of several": "inspect {at}",
    "nothing to roll back": "rollback {at}/a.faiss",
    "no judgments": "refine {at}/a.faiss --refiner {at}/refiner",
    "queries without judgments": "refine {at}/a.faiss --queries {at}/q.npy",
    "queries without ids": "refine {at}/a.faiss --queries {at}/q.npy --qrels {at}/qrels.tsv",
    "labels of other rows": "refine {at}/a.faiss --labels {at}/q.txt",
    "a field where there is none": "refine {at}/a.faiss --group-field x",
    "a mode that it has not": "refine {at}/a.faiss --labels {at}/l.txt --mode new-vector",
    "nothing to evaluate by": "evaluate {at}/a.faiss",
    "a command that is nearly right": "night {at}/a.faiss",
    "a command that there is not": "apply {at}/a.faiss",
    "an option that there is not": "inspect {at}/a.faiss --jsn",
    "no index": "inspect",
    "a server that is not there": "inspect qdrant://localhost:1/x",
    "a scheme that there is not": "inspect pinecone:x",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_last_words_tell_what_to_type(mistake: str, tmp_path: Path) -> None:
    index = faiss.IndexFlatIP(4)
    index.add(np.random.default_rng(0).normal(size=(30, 4)).astype(np.float32))
    for name in ("a.faiss", "b.faiss"):
        faiss.write_index(index, str(tmp_path / name))
    np.save(tmp_path / "q.npy", np.eye(4, dtype=np.float32))
    (tmp_path / "q.txt").write_text("a\nb\nc\nd\n")
    (tmp_path / "l.txt").write_text("a\n" * 30)
    (tmp_path / "qrels.tsv").write_text("a\t1\t1\n")
    (tmp_path / "refiner").mkdir()
    words = MISTAKES[mistake].format(at=tmp_path).split()
    run = CliRunner().invoke(cli, words, prog_name="simskip")
    assert run.exit_code in (1, 2)
    told = str(run.exception) if not isinstance(run.exception, SystemExit) else run.output
    assert NEXT.search(told.replace(str(tmp_path), "")), told
    assert "Traceback" not in run.output
