"""The contract of a store as tests that every connector runs.

Subclass `StoreContract` in a test module, `FileContract` where the store is one file, `RowContract`
where its rows are written one by one. Give it a way to make a store and a way to read one that
bypasses the code under test::

    class TestMyStore(RowContract):
        metrics = (Metric.DOT,)

        def make_store(self, ids, vectors, metric):
            ...

        def raw_rows(self, store):
            ...
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray

from simskip_vdb.by_vector import near
from simskip_vdb.datatypes import Ids, Mask, Metric, VectorBatch, Vectors, id_names, silent
from simskip_vdb.errors import ConfigError, DataError, SimskipError
from simskip_vdb.store import Check, FileBacked, RowWritable, VectorStore

_SEED = 20
_K = 10
_CODES = 0.05  # relative L2 error of codes that a file may hold


class StoreContract:
    """What every `VectorStore` keeps.

    Attributes:
        metrics: Metrics that the store knows.
        positional: True where ids are positions.
        exact: True where vectors are read back bit for bit.
        tolerance: Largest error of a number that is read back, where `exact` is false.
        score_error: Largest error of a score, for engines that round queries.
        search_params: Settings with which search finds every row.
        count: Rows that are tried.
        dim: Dimension that is tried.
    """

    metrics: ClassVar[tuple[Metric, ...]] = tuple(Metric)
    positional: bool = False
    exact: bool = True
    tolerance: float = 0.0
    score_error: float = 1e-5
    search_params: Mapping[str, Any] = MappingProxyType({})
    count: int = 60
    dim: int = 8

    def unknown_id(self, ids: Ids) -> Ids:
        """Return an id that no row has, as an array of shape (1,)."""
        return np.array([int(ids[-1]) + 1]).astype(ids.dtype)

    def make_store(self, ids: Ids, vectors: Vectors, metric: Metric) -> VectorStore:
        """Make a store of these rows, whose scan order is this order."""
        raise NotImplementedError

    def raw_rows(self, store: VectorStore) -> tuple[Ids, Vectors]:
        """Read all rows in scan order without the code under test."""
        raise NotImplementedError

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Go through the metrics that the store knows."""
        if "metric" in metafunc.fixturenames:
            metafunc.parametrize("metric", self.metrics, ids=lambda metric: metric.value)

    @pytest.fixture
    def ids(self) -> Ids:
        """Ids in scan order, with holes where ids are free."""
        return np.arange(self.count) * (1 if self.positional else 3)

    @pytest.fixture
    def vectors(self) -> Vectors:
        """Vectors of unit length, so that a store that normalises keeps them."""
        return _unit_vectors(self.count, self.dim, _SEED)

    @pytest.fixture
    def refined(self) -> Vectors:
        """Other vectors for the same rows."""
        return _unit_vectors(self.count, self.dim, _SEED + 1)

    @pytest.fixture
    def store(self, ids: Ids, vectors: Vectors, metric: Metric) -> VectorStore:
        """Give a store of these rows."""
        return self.make_store(ids, vectors, metric)

    def test_info(self, store: VectorStore, metric: Metric) -> None:
        """It says what it is."""
        info = store.info()
        assert (info.count, info.dim, info.metric) == (self.count, self.dim, metric)
        assert (info.positional, info.exact) == (self.positional, self.exact)
        assert info.uri
        assert info.kind

    @pytest.mark.parametrize("batch_size", [1, 7, 60, 1000])
    def test_scan_yields_every_row_once_in_order(
        self, store: VectorStore, ids: Ids, vectors: Vectors, batch_size: int
    ) -> None:
        """Every row once, whatever the size of a batch."""
        batches = list(store.scan(batch_size))
        assert max(map(len, batches)) <= batch_size
        assert all(batch.vectors.dtype == np.float32 for batch in batches)
        read_ids, read = _together(batches)
        np.testing.assert_array_equal(read_ids, ids)
        self._assert_close(read, vectors)

    def test_scan_reads_what_is_stored(self, store: VectorStore) -> None:
        """What is read is what a reader without our code finds, to the bit."""
        ids, vectors = _together(store.scan(7))
        raw_ids, raw = self.raw_rows(store)
        np.testing.assert_array_equal(ids, raw_ids)
        assert vectors.tobytes() == raw.tobytes()

    def test_scan_goes_on_after_every_cursor(self, store: VectorStore) -> None:
        """A cursor leads to the rows after its batch, and the last one to none."""
        batches = list(store.scan(7))
        for done, batch in enumerate(batches, start=1):
            assert batch.cursor is not None
            rest = list(store.scan(7, cursor=batch.cursor))
            assert [b.ids.tolist() for b in rest] == [b.ids.tolist() for b in batches[done:]]

    def test_scan_refuses_what_makes_no_sense(self, store: VectorStore) -> None:
        """An empty batch and an unknown field are configuration errors."""
        with pytest.raises(ConfigError):
            list(store.scan(0))
        with pytest.raises(ConfigError):
            list(store.scan(7, fields=["no such field"]))

    def test_fetch_keeps_the_order_asked(
        self, store: VectorStore, ids: Ids, vectors: Vectors
    ) -> None:
        """Rows come in the order asked, repeated where asked twice."""
        wanted = np.array([5, 0, self.count - 1, 5])
        self._assert_close(store.fetch(ids[wanted]), vectors[wanted])
        assert store.fetch(ids[:0]).shape == (0, self.dim)

    def test_fetch_refuses_an_unknown_id(self, store: VectorStore, ids: Ids) -> None:
        """An unknown id among known ones is named."""
        unknown = self.unknown_id(ids)
        with pytest.raises(DataError, match=id_names(unknown)[0]):
            store.fetch(np.append(ids[0], unknown))

    def test_search_finds_the_nearest_first(self, store: VectorStore, metric: Metric) -> None:
        """Ids and scores are those of exact search over what is stored."""
        queries = _unit_vectors(9, self.dim, _SEED + 2)
        self._assert_exact_search(store, queries, metric)

    def test_search_marks_missing_rows(self, store: VectorStore, ids: Ids) -> None:
        """Where there are fewer than k rows, the rest has no id and scores -inf."""
        queries = _unit_vectors(2, self.dim, _SEED + 2)
        found = store.search(queries, self.count + 5, self.search_params)
        assert found.ids.shape == found.scores.shape == (2, self.count + 5)
        assert found.scores.dtype == np.float32
        for row_ids, scores in zip(found.ids, found.scores, strict=True):
            np.testing.assert_array_equal(np.sort(row_ids[: self.count]), np.sort(ids))
            assert (row_ids[self.count :] == (b"" if ids.dtype.kind == "S" else -1)).all()
            assert np.isneginf(scores[self.count :]).all()

    def test_search_refuses_what_it_does_not_know(self, store: VectorStore) -> None:
        """An unknown parameter, k below 1 and a wrong dimension are named."""
        queries = _unit_vectors(2, self.dim, _SEED)
        with pytest.raises(ConfigError, match="no_such_parameter"):
            store.search(queries, 3, {"no_such_parameter": 1})
        with pytest.raises(ConfigError):
            store.search(queries, 0, {})
        with pytest.raises(DataError):
            store.search(queries[:, 1:], 3, {})

    def test_errors_name_the_store(self, store: VectorStore) -> None:
        """A person can tell which store an error is about."""
        uri = store.info().uri
        with pytest.raises(SimskipError) as error:
            list(store.scan(7, fields=["no such field"]))
        assert uri in str(error.value)
        with pytest.raises(SimskipError) as error:
            store.search(np.zeros((1, self.dim), np.float32), 3, {"no_such_parameter": 1})
        assert uri in str(error.value)

    def _assert_holds(self, store: VectorStore, ids: Ids, vectors: Vectors) -> None:
        for read_ids, read in (self.raw_rows(store), _together(store.scan(7))):
            np.testing.assert_array_equal(read_ids, ids)
            self._assert_close(read, vectors)

    def _assert_close(self, read: Vectors, expected: Vectors) -> None:
        if self.exact:
            assert read.tobytes() == expected.tobytes()
        else:
            np.testing.assert_allclose(read, expected, rtol=0, atol=self.tolerance)

    def _assert_untouched(self, store: VectorStore, before: tuple[Ids, Vectors]) -> None:
        for ids, vectors in (self.raw_rows(store), _together(store.scan(7))):
            np.testing.assert_array_equal(ids, before[0])
            assert vectors.tobytes() == before[1].tobytes()

    def _assert_exact_search(self, store: VectorStore, queries: Vectors, metric: Metric) -> None:
        ids, vectors = self.raw_rows(store)
        scores = exact_scores(queries, vectors, metric)  # (q, n)
        best = np.argsort(-scores, axis=1)[:, :_K]
        found = store.search(queries, _K, self.search_params)
        np.testing.assert_array_equal(found.ids, ids[best])
        expected = np.take_along_axis(scores, best, axis=1)
        np.testing.assert_allclose(found.scores, expected, rtol=1e-4, atol=self.score_error)


class FileContract(StoreContract):
    """What a `FileBacked` store keeps as well."""

    def test_a_length_that_was_read_can_be_written(
        self, ids: Ids, vectors: Vectors, refined: Vectors, metric: Metric
    ) -> None:
        """Whatever lengths rows were given: a vector as long as what is read comes back."""
        store = self.make_store(ids, _lengthened(vectors), metric)
        _, read = _together(store.scan(7))
        wanted = refined * np.linalg.norm(read, axis=1, keepdims=True)
        _replace(store, _batches(ids, wanted, 7), _accept)
        within = store.info().rounding if self.exact else _CODES
        assert near(_together(store.scan(7))[1], wanted, within).all()

    def test_replace_all_rows(
        self, store: VectorStore, ids: Ids, refined: Vectors, metric: Metric
    ) -> None:
        """New vectors are stored, in the same order, and found."""
        before = store.info()
        _replace(store, _batches(ids, refined, 7), _accept)
        self._assert_holds(store, ids, refined)
        assert store.info() == before
        self._assert_exact_search(store, refined[:9], metric)

    def test_replace_some_rows(
        self, store: VectorStore, ids: Ids, vectors: Vectors, refined: Vectors
    ) -> None:
        """Rows left out keep their vectors."""
        chosen = np.zeros(self.count, np.bool_)
        chosen[[1, 2, 30, self.count - 2]] = True
        _replace(store, _batches(ids[chosen], refined[chosen], 3), _accept)
        self._assert_holds(store, ids, np.where(chosen[:, None], refined, vectors))

    def test_replace_nothing(self, store: VectorStore, ids: Ids, vectors: Vectors) -> None:
        """No batches and empty ones change nothing."""
        _replace(store, [], _accept)
        _replace(store, _batches(ids[:0], vectors[:0], 3), _accept)
        self._assert_holds(store, ids, vectors)

    def test_check_sees_the_new_rows(self, store: VectorStore, ids: Ids, refined: Vectors) -> None:
        """The check is handed a store that holds what was written."""
        seen = []

        def check(candidate: VectorStore) -> None:
            seen.append(_together(candidate.scan(1000)))

        _replace(store, _batches(ids, refined, 7), check)
        ((read_ids, read),) = seen
        np.testing.assert_array_equal(read_ids, ids)
        self._assert_close(read, refined)

    def test_check_refuses(self, store: VectorStore, ids: Ids, refined: Vectors) -> None:
        """An error in the check passes through, and the rows are as they were."""

        def refuse(candidate: VectorStore) -> None:
            raise LookupError("refused")

        before = self.raw_rows(store)
        with pytest.raises(LookupError, match="refused"):
            _replace(store, _batches(ids, refined, 7), refuse)
        self._assert_untouched(store, before)

    def test_batches_fail(self, store: VectorStore, ids: Ids, refined: Vectors) -> None:
        """An error of the one who makes the batches passes through, too."""

        def batches() -> Iterator[VectorBatch]:
            yield VectorBatch(ids=ids[:7], vectors=refined[:7])
            raise LookupError("no more")

        before = self.raw_rows(store)
        with pytest.raises(LookupError, match="no more"):
            _replace(store, batches(), _accept)
        self._assert_untouched(store, before)

    @pytest.mark.parametrize("wrong", ["unknown id", "order", "twice", "dimension", "length"])
    def test_replace_refuses_wrong_batches(
        self, store: VectorStore, ids: Ids, refined: Vectors, wrong: str
    ) -> None:
        """Bad batches after a good one are data errors, and the rows are as they were."""
        before = self.raw_rows(store)
        good = VectorBatch(ids=ids[:7], vectors=refined[:7])
        rows = {
            "unknown id": (self.unknown_id(ids), refined[:1]),
            "order": (ids[[9, 8]], refined[:2]),
            "twice": (ids[[6]], refined[:1]),
            "dimension": (ids[[9]], refined[:1, 1:]),
            "length": (ids[[9, 10]], refined[:1]),
        }[wrong]
        with pytest.raises(DataError):
            _replace(store, [good, VectorBatch(ids=rows[0], vectors=rows[1])], _accept)
        self._assert_untouched(store, before)


class RowContract(StoreContract):
    """What a `RowWritable` store keeps as well."""

    def test_a_length_that_was_read_can_be_written(
        self, ids: Ids, vectors: Vectors, refined: Vectors, metric: Metric
    ) -> None:
        """Whatever lengths rows were given: a vector as long as what is read comes back."""
        store = self.make_store(ids, _lengthened(vectors), metric)
        assert isinstance(store, RowWritable)
        _, read = _together(store.scan(7))
        wanted = refined * np.linalg.norm(read, axis=1, keepdims=True)
        assert store.update(VectorBatch(ids=ids, vectors=wanted), _any_row).all()
        store.settle(silent)
        assert near(_together(store.scan(7))[1], wanted, store.info().rounding).all()

    def test_update_writes_rows(
        self, store: VectorStore, ids: Ids, vectors: Vectors, refined: Vectors, metric: Metric
    ) -> None:
        """New vectors are stored where they belong, and found; the others stay."""
        assert isinstance(store, RowWritable)
        before = store.info()
        chosen = np.zeros(self.count, np.bool_)
        chosen[[1, 2, 30, self.count - 2]] = True
        written = store.update(VectorBatch(ids=ids[chosen], vectors=refined[chosen]), _any_row)
        store.settle(silent)
        assert written.all()
        self._assert_holds(store, ids, np.where(chosen[:, None], refined, vectors))
        store.update(VectorBatch(ids=ids[::-1], vectors=refined[::-1]), _any_row)
        store.settle(silent)
        self._assert_holds(store, ids, refined)
        assert store.info() == before
        self._assert_exact_search(store, refined[:9], metric)

    def test_update_twice_is_update_once(
        self, store: VectorStore, ids: Ids, refined: Vectors
    ) -> None:
        """A batch may be sent again."""
        assert isinstance(store, RowWritable)
        for _ in range(2):
            assert store.update(VectorBatch(ids=ids, vectors=refined), _any_row).all()
        store.settle(silent)
        self._assert_holds(store, ids, refined)

    def test_update_spares_what_it_must(
        self, store: VectorStore, ids: Ids, vectors: Vectors, refined: Vectors
    ) -> None:
        """Rows are shown as they are, and those that are not allowed stay."""
        assert isinstance(store, RowWritable)
        shown = []

        def allowed(now: VectorBatch) -> Mask:
            shown.append(now)
            return np.isin(now.ids, ids[::2])

        written = store.update(VectorBatch(ids=ids, vectors=refined), allowed)
        np.testing.assert_array_equal(written, np.arange(self.count) % 2 == 0)
        store.settle(silent)
        self._assert_holds(store, ids, np.where(written[:, None], refined, vectors))
        seen_ids, seen = _together(shown)
        order = np.argsort(seen_ids)
        np.testing.assert_array_equal(seen_ids[order], np.sort(ids))
        self._assert_close(seen[order], vectors[np.argsort(ids)])

    def test_update_adds_no_row(self, store: VectorStore, ids: Ids, refined: Vectors) -> None:
        """A row that is not there is neither shown nor written nor added."""
        assert isinstance(store, RowWritable)
        gone = self.unknown_id(ids)
        batch = VectorBatch(ids=np.append(ids[:3], gone), vectors=refined[:4])
        assert store.update(batch, _any_row).tolist() == [True, True, True, False]
        store.settle(silent)
        assert gone not in self.raw_rows(store)[0]
        assert store.info().count == self.count

    def test_update_of_nothing(self, store: VectorStore, ids: Ids, vectors: Vectors) -> None:
        """An empty batch changes nothing."""
        assert isinstance(store, RowWritable)
        assert store.update(VectorBatch(ids=ids[:0], vectors=vectors[:0]), _any_row).shape == (0,)
        store.settle(silent)
        self._assert_holds(store, ids, vectors)

    @pytest.mark.parametrize("wrong", ["twice", "dimension", "length", "NaN"])
    def test_update_refuses_wrong_batches(
        self, store: VectorStore, ids: Ids, refined: Vectors, wrong: str
    ) -> None:
        """Bad batches are data errors, and no row was written."""
        assert isinstance(store, RowWritable)
        before = self.raw_rows(store)
        nan = refined[:2].copy()
        nan[1, 0] = np.nan
        rows = {
            "twice": (ids[[6, 6]], refined[:2]),
            "dimension": (ids[:2], refined[:2, 1:]),
            "length": (ids[[9, 10]], refined[:1]),
            "NaN": (ids[:2], nan),
        }[wrong]
        with pytest.raises(DataError):
            store.update(VectorBatch(ids=rows[0], vectors=rows[1]), _any_row)
        store.settle(silent)
        self._assert_untouched(store, before)

    def test_an_error_in_allowed_gets_out(
        self, store: VectorStore, ids: Ids, refined: Vectors
    ) -> None:
        """Nothing is written where nobody could say whether it may."""
        assert isinstance(store, RowWritable)

        def fail(now: VectorBatch) -> Mask:
            raise LookupError("unknown")

        before = self.raw_rows(store)
        with pytest.raises(LookupError, match="unknown"):
            store.update(VectorBatch(ids=ids, vectors=refined), fail)
        store.settle(silent)
        self._assert_untouched(store, before)

    def test_peek_returns_what_is_there(
        self, store: VectorStore, ids: Ids, vectors: Vectors
    ) -> None:
        """Rows come in the order asked, without those that are not there."""
        assert isinstance(store, RowWritable)
        wanted = np.array([5, 0, self.count - 1])
        found = store.peek(np.append(self.unknown_id(ids), ids[wanted]))
        np.testing.assert_array_equal(found.ids, ids[wanted])
        self._assert_close(found.vectors, vectors[wanted])


def exact_scores(queries: Vectors, vectors: Vectors, metric: Metric) -> NDArray[np.float64]:
    """Score every pair in float64, written out from the definition, shape (q, n)."""
    left = queries.astype(np.float64)[:, None]  # (q, 1, d)
    right = vectors.astype(np.float64)[None]  # (1, n, d)
    scores: NDArray[np.float64]
    if metric is Metric.EUCLID:
        scores = -((left - right) ** 2).sum(axis=-1)
    else:
        scores = (left * right).sum(axis=-1)
    if metric is Metric.COSINE:
        scores /= np.linalg.norm(left, axis=-1) * np.linalg.norm(right, axis=-1)
    return scores


def _replace(store: VectorStore, batches: Iterable[VectorBatch], check: Check) -> None:
    assert isinstance(store, FileBacked)
    with store.prepared(batches, keep=None, expected=store.sha256()) as candidate:
        check(candidate.store)
        candidate.commit()


def _any_row(now: VectorBatch) -> Mask:
    return np.ones(len(now), np.bool_)


def _accept(candidate: VectorStore) -> None:
    """Check nothing."""


def _unit_vectors(count: int, dim: int, seed: int) -> Vectors:
    vectors = np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)
    unit: Vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return unit


def _lengthened(vectors: Vectors) -> Vectors:
    lengths = np.geomspace(0.7, 1.4, len(vectors), dtype=np.float32)
    longer: Vectors = vectors * lengths[:, None]
    return longer


def _batches(ids: Ids, vectors: Vectors, size: int) -> Iterator[VectorBatch]:
    for start in range(0, max(len(ids), 1), size):
        stop = start + size
        yield VectorBatch(ids=ids[start:stop], vectors=vectors[start:stop])


def _together(batches: Iterator[VectorBatch] | list[VectorBatch]) -> tuple[Ids, Vectors]:
    parts = list(batches)
    return (
        np.concatenate([part.ids for part in parts]),
        np.concatenate([part.vectors for part in parts]),
    )
