from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from builders import clusters, flat, random_refiner
from edge_shards import create, fill, params
from langchain_core.embeddings import DeterministicFakeEmbedding
from llama_index.core.embeddings import MockEmbedding
from script import simskip
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import BoW

from simskip_vdb import cli
from simskip_vdb.datatypes import Metric, Side

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
SERVICES = (ROOT / "docs" / "services.md").read_text()


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the README's examples name."""
    folder = tmp_path_factory.mktemp("readme")
    docs, queries, row_group, query_group = clusters(np.random.default_rng(0), 400, 300)
    for name in ("products.faiss", "intents.faiss"):
        index = faiss.IndexFlatIP(docs.shape[1])
        index.add(docs)
        faiss.write_index(index, str(folder / name))
    np.save(folder / "q.npy", queries)
    (folder / "q.txt").write_text("".join(f"q{i}\n" for i in range(len(queries))))
    (folder / "ids.txt").write_text("".join(f"d{i}\n" for i in range(len(docs))))
    (folder / "labels.txt").write_text("".join(f"{group}\n" for group in row_group))
    lines = [
        f"q{query}\td{row}\t1\n"
        for query, group in enumerate(query_group)
        for row in np.flatnonzero(row_group == group)
    ]
    (folder / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(lines))
    random_refiner(docs.shape[1], np.arange(400)).save(folder / "refiner")
    table = {"id": [f"q{i}" for i in range(len(queries))], "vector": queries.tolist()}
    pq.write_table(pa.table(table), folder / "q.parquet")
    (folder / "jobs.toml").write_text(
        '[jobs.papers]\nindex = "products.faiss"\nqueries = "q.npy"\nquery_ids = "q.txt"\n'
        'qrels = "qrels.tsv"\ndoc_ids = "ids.txt"\n'
    )
    shard = create(folder / "products", {"text": params(docs.shape[1], Metric.COSINE)})
    payloads = [{"sku": f"d{i}", "updated_at": 1} for i in range(len(docs))]
    fill(shard, range(len(docs)), docs, "text", payloads)
    shard.close()
    return folder


def test_readme_commands_run(desk: Path) -> None:
    lines = [
        line
        for block in blocks("console")
        for line in block.replace("\\\n", " ").splitlines()
        if line.startswith("simskip ")
    ]
    assert len(lines) >= 3
    for line in lines:
        # There is no server here; a shard of the same engine takes its place.
        command = line.replace("qdrant://localhost:6333/products", "qdrant-edge:products")
        done = simskip(*shlex.split(command)[1:], cwd=desk)
        assert done.returncode in (0, 3), (line, done.stderr)


def test_readme_python_runs(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in desk.glob("*.simskip"):
        shutil.rmtree(path)
    monkeypatch.chdir(desk)
    scope = {"raw_queries": np.load("q.npy")}
    examples = blocks("python")
    assert len(examples) >= 2
    for example in examples:
        exec(compile(example, "README.md", "exec"), scope)
    np.testing.assert_array_equal(scope["queries"], scope["raw_queries"])


def test_services_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = np.random.default_rng(0).normal(size=(50, 16)).astype(np.float32)
    flat(tmp_path / "raw.faiss", rows)
    refiner = random_refiner(16, np.arange(50), side=Side.BOTH)
    refiner.save("refiner")
    done = simskip(
        *shlex.split("refine raw.faiss --refiner refiner --output better.faiss"),
        "--accept-unmeasured",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    monkeypatch.setenv("REFINER_REVISION", refiner.id)
    words = [f"word{i}" for i in range(16)]
    SentenceTransformer(modules=[BoW(words)], device="cpu").save("encoder")
    counted = np.eye(16, dtype=np.float32)[[1]] + np.eye(16, dtype=np.float32)[[2]]
    scope: dict[str, Any] = {
        "raw_queries": rows,
        "embeddings": DeterministicFakeEmbedding(size=16),
        "embed_model": MockEmbedding(embed_dim=16),
    }
    examples = blocks("python", SERVICES)
    assert len(examples) == 7
    for example in examples[:3]:
        exec(compile(example, "services.md", "exec"), scope)
    np.testing.assert_array_equal(scope["query"], refiner(counted)[0])
    np.testing.assert_array_equal(scope["document"], counted[0])
    np.testing.assert_array_equal(scope["queries"], refiner(rows))
    for example in examples[3:]:
        exec(compile(example, "services.md", "exec"), scope)
    np.testing.assert_allclose(scope["queries"], refiner(rows), rtol=1e-4, atol=1e-4)
    assert scope["documents"] == [[0.5] * 16] * 2


def test_readme_names_every_command_and_no_other() -> None:
    named = set(re.findall(r"simskip ([a-z]+)", README))
    assert named == set(cli.cli.commands)


def test_readme_has_no_gaps() -> None:
    assert "@@" not in README
    assert "TODO" not in README


def test_makefile_has_the_targets_that_people_are_told_of() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"demo", "test", "lint", "type", "bench", "dist"} <= targets
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_contributing_points_to_files_that_exist() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for name in re.findall(r"`([a-z_/]+\.py)`", text):
        assert (ROOT / name).exists() or (ROOT / "simskip_vdb" / name).exists(), name
