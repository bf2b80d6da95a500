"""Learn again, from new vectors, what a FAISS index learned from its old ones.

Centroids, ranges, codebooks and rotations of the old vectors cost recall. FAISS trains neither a
quantiser that holds centroids already nor one that says it is trained, so each level is told to.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from simskip_vdb.connectors.faiss_gpu import on_gpu, training_on_gpu
from simskip_vdb.connectors.faiss_tree import (
    ADDITIVE,
    FLAT,
    HNSW,
    ID_MAPS,
    IVF,
    NSG,
    PRODUCT,
    RABITQ,
    REFINES,
    SCALAR,
    Index,
    core,
    down,
    inner,
    matrix_of,
    scalar_code,
    storage_of,
    transforms,
)
from simskip_vdb.datatypes import Vectors

_SEED = 0
_POINTS_PER_CENTROID = 256
_LEAST_SAMPLE = 16384
_OF_A_PCA = ("A", "b", "PCAMat", "mean", "eigenvalues")
_PROBES, _NEIGHBOURS = 1000, 10
_LEARNED_TRANSFORMS = (faiss.PCAMatrix, faiss.OPQMatrix, faiss.CenteringTransform)


def learns(index: Index) -> bool:
    """Say whether an index learns something from its rows, at any level."""
    if type(index) is faiss.IndexPreTransform and any(map(_is_learned, _steps(index))):
        return True
    if (wrapped := inner(index)) is not None:
        return learns(wrapped)
    if type(index) in REFINES:
        return learns(down(index.base_index)) or learns(storage_of(index))
    if type(index) in (*HNSW, *NSG):
        return learns(storage_of(index))
    if type(index) is faiss.IndexScalarQuantizer:
        return scalar_code(index) not in ("fp16", "bf16")
    return type(index) not in FLAT


def sample_size(index: Index) -> int:
    """Return how many rows to learn from."""
    return max(_LEAST_SAMPLE, _POINTS_PER_CENTROID * _centroids(index))


def draw(count: int, size: int) -> NDArray[np.bool_]:
    """Draw the rows to learn from, as a mask of shape (count,)."""
    chosen = np.zeros(count, np.bool_)
    rng = np.random.default_rng(_SEED)
    chosen[rng.choice(count, min(size, count), replace=False)] = True
    return chosen


def train(index: Index, sample: Vectors, extremes: Vectors | None) -> None:
    """Learn from new vectors at every level; too few of them leave what was learned.

    Args:
        index: Without rows.
        sample: Rows to learn from, all finite, shape (m, d).
        extremes: Each dimension's least and largest value over all rows, shape (2, d); None where
            they are not known.
    """
    if type(index) is faiss.IndexPreTransform:
        train(down(index.index), _train_steps(index, sample), None)
    elif (wrapped := inner(index)) is not None:
        train(wrapped, sample, extremes)
    elif type(index) in REFINES:
        train(down(index.base_index), sample, extremes)
        train(storage_of(index), sample, extremes)
    elif learns(index) and len(sample) >= _centroids(index):
        _train_core(index, sample, extremes)


def spans_unseen_ranges(index: Index) -> bool:
    """Tell an index whose codes cut a range that `train` could not know for every row."""
    body = core(index)
    behind = type(body) in IVF or (body is not index and type(index) not in ID_MAPS)
    return behind and _goes_by_range(storage_of(body))


def span(index: Index, rows: Iterable[Vectors]) -> None:
    """Widen the ranges that a scalar quantiser learned from a sample, so that no row is cut off.

    Args:
        index: Trained, `spans_unseen_ranges`.
        rows: All rows as its core gets them, shape (b, d).
    """
    body = core(index)
    storage = storage_of(body)
    learned = faiss.vector_to_array(storage.sq.trained)  # least values, then widths
    low, width = learned[: storage.d], learned[storage.d :]
    high = low + width
    quantizer: Index = on_gpu(down(body.quantizer)) if type(body) in IVF else None
    for vectors in rows:
        parts = vectors[np.isfinite(vectors).all(axis=1)]
        if type(body) in IVF and body.by_residual and len(parts):
            homes = quantizer.search(parts, 1)[1][:, 0]
            parts = parts - body.quantizer.reconstruct_batch(homes)
        low = np.minimum(low, parts.min(axis=0, initial=np.inf))
        high = np.maximum(high, parts.max(axis=0, initial=-np.inf))
    faiss.copy_array_to_vector(np.concatenate([low, high - low]), storage.sq.trained)


def _train_core(index: Index, sample: Vectors, extremes: Vectors | None) -> None:
    if type(index) in IVF:
        _forget_centroids(index)
    storage = storage_of(index)
    if extremes is not None and type(index) not in IVF and _goes_by_range(storage):
        sample = _range(storage, extremes)
    for part in (index, storage):
        part.is_trained = False
        if type(part) in PRODUCT:
            part.pq.cp.min_points_per_centroid = 1
        if type(part) in ADDITIVE:
            _forget_codebooks(_additive(part))
    with training_on_gpu(storage if type(index) not in IVF else index):
        index.train(sample)


def _additive(index: Index) -> Any:  # noqa: ANN401 FAISS's quantisers have no types
    return next(
        getattr(index, field) for field in ("rq", "lsq", "prq", "plsq") if hasattr(index, field)
    )


def _forget_codebooks(quantizer: Any) -> None:  # noqa: ANN401 FAISS's quantisers have no types
    quantizer.is_trained = False
    parts = [quantizer]
    if hasattr(quantizer, "subquantizer"):
        parts = [quantizer.subquantizer(i) for i in range(quantizer.nsplits)]
    for part in map(faiss.downcast_AdditiveQuantizer, parts):
        if hasattr(part, "cp"):
            part.cp.min_points_per_centroid = 1


def _forget_centroids(ivf: Index) -> None:
    quantizer = down(ivf.quantizer)
    quantizer.reset()
    # None of these is in the file: this is how FAISS's constructor and factory set them, except
    # for the last, which keeps FAISS from printing a warning.
    ivf.cp.spherical = ivf.metric_type == faiss.METRIC_INNER_PRODUCT
    if type(ivf) in RABITQ and type(quantizer) in FLAT:
        ivf.cp.spherical = False  # means are nearer to the rows, whose codes are relative to them
    ivf.quantizer_trains_alone = 0 if type(quantizer) in FLAT else 2
    ivf.cp.min_points_per_centroid = 1


def _centroids(index: Index) -> int:
    """Return the largest number of centroids that any level learns."""
    if type(index) in REFINES:
        return max(_centroids(down(index.base_index)), _centroids(storage_of(index)))
    part = storage_of(core(index))
    return max(
        part.nlist if type(part) in IVF else 1,
        part.pq.ksub if type(part) in PRODUCT else 1,
        _additive_centroids(part) if type(part) in ADDITIVE else 1,
    )


def _additive_centroids(index: Index) -> int:
    bits = faiss.vector_to_array(_additive(index).nbits)
    return 1 << int(bits.max()) if len(bits) else 1


def _goes_by_range(storage: Index) -> bool:
    is_scalar = type(storage) in SCALAR and scalar_code(storage) == "8bit"
    return is_scalar and bool(storage.sq.rangestat == faiss.ScalarQuantizer.RS_minmax)


def _range(quantizer: Index, extremes: Vectors) -> Vectors:
    """Return two rows that span all rows, whose codes stay the same where nothing moved.

    FAISS cuts the range into 255 steps, rounds down, and decodes to the middle of a step. Ranges
    of decoded rows are therefore half a step too high, by which rows would drift at each rewrite.
    """
    widths = faiss.vector_to_array(quantizer.sq.trained)[quantizer.d :]
    spanning: Vectors = extremes - widths / 255 / 2  # (2, d)
    return spanning


def _steps(chain: Index) -> list[tuple[Any, int]]:
    """Return each transform with the number of PQ sub-spaces that it serves, 0 for none."""
    steps = transforms(chain)
    part = storage_of(core(chain))
    if type(part) in REFINES:
        part = core(down(part.base_index))
    spaces = part.pq.M if type(part) in PRODUCT else 0
    return [(step, spaces if step is steps[-1] else 0) for step in steps]


def _is_learned(step: tuple[Any, int]) -> bool:
    transform, spaces = step
    return type(transform) in _LEARNED_TRANSFORMS or _is_opq(transform, spaces)


def _is_opq(transform: Any, spaces: int) -> bool:  # noqa: ANN401 FAISS's transforms have no types
    """Recognise a rotation learned for a PQ, which FAISS saves as a mere linear transform."""
    if type(transform) is not faiss.LinearTransform or not spaces or transform.d_out % spaces:
        return False
    a, b = matrix_of(transform)
    return not b.any() and np.allclose(a @ a.T, np.eye(len(a)), atol=1e-3)


def _train_steps(chain: Index, sample: Vectors) -> Vectors:
    """Learn the transforms one after the other; return the sample transformed."""
    for transform, spaces in _steps(chain):
        if len(sample) >= transform.d_in:
            if _is_opq(transform, spaces):
                _learn_rotation(transform, spaces, sample)
            elif type(transform) is faiss.PCAMatrix:
                _learn_reduction(transform, sample, chain.metric_type)
            elif type(transform) in _LEARNED_TRANSFORMS:
                transform.is_trained = False
                transform.train(sample)
        sample = transform.apply(sample)
    return sample


def _learn_reduction(pca: Any, sample: Vectors, metric: int) -> None:  # noqa: ANN401 untyped
    """Learn a PCA again, unless it finds fewer neighbours so.

    Queries stay where they were, and so do rows of later, so directions that mattered to the old
    rows often serve the new ones better than their own: where rows moved by a smooth function of
    little effect on their order, its directions would crowd out finer ones.
    """
    old = {name: faiss.vector_to_array(getattr(pca, name)) for name in _OF_A_PCA}
    queries = sample[:: max(1, len(sample) // _PROBES)][:_PROBES]
    nearest = faiss.knn(queries, sample, _NEIGHBOURS, metric)[1]

    def found() -> int:
        rows, seen = pca.apply(sample), pca.apply(queries)
        here = faiss.knn(seen, rows, _NEIGHBOURS, metric)[1]
        return int((here[:, :, None] == nearest[:, None, :]).sum())

    before = found()
    pca.is_trained = False
    pca.train(sample)
    if found() < before:
        for name, values in old.items():
            faiss.copy_array_to_vector(values, getattr(pca, name))


def _learn_rotation(transform: Any, spaces: int, sample: Vectors) -> None:  # noqa: ANN401 untyped
    opq = faiss.OPQMatrix(transform.d_in, spaces, transform.d_out)
    codebook = faiss.ProductQuantizer(transform.d_out, spaces, 8)  # what OPQ would make itself
    codebook.cp.min_points_per_centroid = 1
    opq.pq = codebook
    if len(sample) < codebook.ksub:
        return
    opq.train(sample)
    faiss.copy_array_to_vector(faiss.vector_to_array(opq.A), transform.A)
