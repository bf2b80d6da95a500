"""Watch an index get better and get restored, on handwritten digits that scikit-learn ships."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simskip_vdb.config import FitSettings
from simskip_vdb.connectors import open_store
from simskip_vdb.datatypes import Progress, Vectors, silent
from simskip_vdb.durable import sha256_of
from simskip_vdb.errors import MissingDependencyError
from simskip_vdb.judgments import JudgmentFiles, read_judgments
from simskip_vdb.pipeline import Settings, refine
from simskip_vdb.report import render
from simskip_vdb.upkeep import rollback

DOCS, VALIDATION = 1200, 150  # of 1,797 digits; the other 447 are test queries
SHOWN = 6  # neighbours drawn beside a query
SEARCH_PARAMS = {"nprobe": 8}


def run_demo(
    folder: Path, *, seed: int = 0, progress: Progress = silent, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Build an index, refine it in place, draw before and after, and roll it back.

    Args:
        folder: Receives the index, the judgments and the picture; what an earlier demo left there
            is replaced.
        seed: Shuffles the digits and seeds the fit.
        progress: Called with (stage, done, total).
        say: Shows text to a person.

    Returns:
        The report of refine, with the picture's path and both checksums.

    Raises:
        MissingDependencyError: An extra is missing: demo, faiss, fit or eval. Without edge, the
            shard is left out.
    """
    images, labels = _digits(seed)
    vectors = images / np.linalg.norm(images, axis=1, keepdims=True)
    queries = vectors[DOCS + VALIDATION :]
    path = _build(folder, vectors, labels)
    before_sha = sha256_of(path)
    say(
        f"{len(images):,} handwritten digits, 8 × 8 pixels: {DOCS:,} rows in {path}, "
        f"{VALIDATION} validation and {len(queries)} test queries; relevant = the same digit.\n"
        f"What follows is the same as\n\n  {_command(path)}\n"
    )
    store = open_store(str(path))
    before = store.search(queries, SHOWN, SEARCH_PARAMS).ids
    judgments = read_judgments(_files(folder))
    settings = Settings(fit=FitSettings(seed=seed), measure="nDCG@10", search_params=SEARCH_PARAMS)
    report = refine(store, judgments, settings, progress=progress)
    say(render(report.to_dict()))
    after = store.search(queries, SHOWN, SEARCH_PARAMS).ids
    picture = _draw(folder / "before-after.png", images, labels, before, after)
    say(f"\nlook at {picture}: queries with their nearest neighbours, before and after")
    undone = rollback(store, progress=progress) if report.exit_code == 0 else None
    after_sha = sha256_of(path)
    say(
        f"\nrolled back: simskip rollback {path}\n"
        f"  SHA-256 before {before_sha}\n  SHA-256 now    {after_sha}"
        f"  {'the same' if before_sha == after_sha else 'DIFFERENT'}"
    )
    shard = _refine_shard(folder, vectors, labels, settings, progress, say)
    return {
        **report.to_dict(),
        "shard": shard,
        "picture": str(picture),
        "sha256": {"before": before_sha, "after_rollback": after_sha},
        "rolled_back": undone,
    }


def _refine_shard(
    folder: Path,
    vectors: Vectors,
    labels: NDArray[np.int64],
    settings: Settings,
    progress: Progress,
    say: Callable[[str], None],
) -> dict[str, Any] | None:
    """Refine the same rows in a Qdrant Edge shard, where the digit is a payload field."""
    try:
        import qdrant_edge as edge
    except ImportError:
        say("\nthe same in a Qdrant Edge shard: pip install 'simskip-vdb[edge]'")
        return None
    path = folder / "digits-shard"
    for old in (path, path.with_name(f"{path.name}.simskip")):
        shutil.rmtree(old, ignore_errors=True)
    path.mkdir()
    params = edge.EdgeVectorParams(vectors.shape[1], edge.Distance.Cosine)
    shard = edge.EdgeShard.create(str(path), edge.EdgeConfig(vectors=params))
    points = [
        edge.Point(i, row, {"digit": int(label)})
        for i, (row, label) in enumerate(zip(vectors[:DOCS].tolist(), labels, strict=False))
    ]
    shard.update(edge.UpdateOperation.upsert_points(points))
    shard.close()
    uri = f"qdrant-edge:{path}"
    files = replace(_files(folder), labels=None)
    judgments = read_judgments(files, group_field="digit")
    store = open_store(uri)
    report = refine(store, judgments, replace(settings, search_params={}), progress=progress)
    undone = rollback(store, progress=progress) if report.exit_code == 0 else None
    found = report.measures["nDCG@10"]
    say(
        f"\nthe same rows in a Qdrant Edge shard, {uri}, with --group-field digit:\n"
        f"  nDCG@10 {found['before']:.4f} → {found['after']:.4f}, "
        + (f"{undone['restored']:,} rows restored" if undone is not None else "nothing written")
    )
    return {"index": uri, "measures": dict(report.measures), "rolled_back": undone}


def _digits(seed: int) -> tuple[Vectors, NDArray[np.int64]]:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise MissingDependencyError("scikit-learn", "demo") from None
    digits = load_digits()
    order = np.random.default_rng(seed).permutation(len(digits.target))
    return digits.data[order].astype(np.float32), digits.target[order].astype(np.int64)


def _build(folder: Path, vectors: Vectors, labels: NDArray[np.int64]) -> Path:
    try:
        import faiss
    except ImportError:
        raise MissingDependencyError("faiss", "faiss") from None
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "digits.faiss"
    shutil.rmtree(path.with_name(path.name + ".simskip"), ignore_errors=True)
    quantizer = faiss.IndexFlatIP(vectors.shape[1])
    index = faiss.IndexIVFFlat(quantizer, vectors.shape[1], 16, faiss.METRIC_INNER_PRODUCT)
    index.train(vectors[:DOCS])
    index.add(vectors[:DOCS])
    faiss.write_index(index, str(path))
    parts = {
        "docs": slice(0, DOCS),
        "dev": slice(DOCS, DOCS + VALIDATION),
        "test": slice(DOCS + VALIDATION, None),
    }
    for name, part in parts.items():
        lines = "".join(f"{label}\n" for label in labels[part])
        (folder / f"{name}_labels.txt").write_text(lines)
        if name != "docs":
            np.save(folder / f"{name}.npy", vectors[part])
    return path


def _files(folder: Path) -> JudgmentFiles:
    return JudgmentFiles(
        labels=folder / "docs_labels.txt",
        dev_queries=folder / "dev.npy",
        dev_labels=folder / "dev_labels.txt",
        test_queries=folder / "test.npy",
        test_labels=folder / "test_labels.txt",
    )


def _command(path: Path) -> str:
    folder = path.parent
    params = ",".join(f"{name}={value}" for name, value in SEARCH_PARAMS.items())
    return (
        f"simskip refine {path} --labels {folder}/docs_labels.txt \\\n"
        f"    --dev-queries {folder}/dev.npy --dev-labels {folder}/dev_labels.txt \\\n"
        f"    --test-queries {folder}/test.npy --test-labels {folder}/test_labels.txt \\\n"
        f"    --measure nDCG@10 --search-params {params}"
    )


def _draw(
    path: Path,
    images: Vectors,
    labels: NDArray[np.int64],
    before: NDArray[np.int64],
    after: NDArray[np.int64],
) -> Path:
    """Draw the queries that gained most and lost most, with their neighbours on both sides."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingDependencyError("matplotlib", "demo") from None
    own = labels[DOCS + VALIDATION :, None]
    gain = (labels[after] == own).sum(axis=1) - (labels[before] == own).sum(axis=1)
    order = np.argsort(-gain, kind="stable")
    chosen = [*order[:6], *order[-2:]]
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(
        "The six queries that gained most, and the two that lost most\n"
        "solid green frame: the same digit; dotted red frame and ×: another digit",
        fontsize=11,
    )
    axes = figure.subplots(len(chosen), 2 * SHOWN + 2)
    gray = {"cmap": "gray_r", "vmin": 0, "vmax": 16}
    for row, query in zip(axes, chosen, strict=True):
        cells = [(DOCS + VALIDATION + query, "query"), *((i, "") for i in before[query])]
        cells += [(-1, ""), *((i, "") for i in after[query])]
        for cell, (i, title) in zip(row, cells, strict=True):
            cell.set_xticks([])
            cell.set_yticks([])
            if i < 0:
                cell.axis("off")
                continue
            cell.imshow(images[i].reshape(8, 8), **gray)
            cell.set_title(title, fontsize=9)
            right = title or labels[i] == labels[DOCS + VALIDATION + query]
            color = "black" if title else ("#1a7f37" if right else "#cf222e")
            for spine in cell.spines.values():
                spine.set_color(color)
                spine.set_linewidth(1 if title else 2.5)
                spine.set_linestyle("-" if right else ":")
            if not right:
                corner = {"ha": "right", "va": "top", "transform": cell.transAxes}
                cell.text(0.96, 1.0, "×", color=color, fontsize=14, weight="bold", **corner)
    for column, title in ((1, "before"), (SHOWN + 2, "after")):
        axes[0][column].set_title(title, fontsize=11, loc="left")
    figure.savefig(path, dpi=110)
    return path
