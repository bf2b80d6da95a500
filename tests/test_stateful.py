"""Random operations on a FAISS file and on the memory store, which must agree."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from faiss_files import KINDS, make_index, read, replace, write
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from simskip_vdb.connectors.faiss_store import FaissStore
from simskip_vdb.connectors.memory import MemoryStore
from simskip_vdb.datatypes import Metric, VectorBatch, Vectors
from simskip_vdb.store import VectorStore

DIM = 4
EXACT_KINDS = sorted(name for name, kind in KINDS.items() if not kind.tolerance)
seeds = st.integers(0, 2**32 - 1)


class FileAgainstMemory(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / "rows.faiss"
        self.draws = 0

    def vectors(self, count: int, seed: int) -> Vectors:
        """Draw vectors that no other draw repeats: equal rows tie, and ties have no order."""
        self.draws += 1
        rng = np.random.default_rng([seed, self.draws])
        return rng.standard_normal((count, DIM)).astype(np.float32)

    def teardown(self) -> None:
        self.folder.cleanup()

    @initialize(
        kind=st.sampled_from(EXACT_KINDS),
        metric=st.sampled_from([Metric.DOT, Metric.EUCLID]),
        count=st.integers(20, 40),
        seed=seeds,
    )
    def make(self, kind: str, metric: Metric, count: int, seed: int) -> None:
        self.kind, self.metric = KINDS[kind], metric
        # Ids in no order; an IVF is scanned by ascending id.
        ids = np.random.default_rng(seed).permutation(count) * 3
        self.by_id = "IVF" in self.kind.factory and "IDMap" not in self.kind.factory
        ids = np.arange(count) if self.kind.positional else ids
        vectors = self.vectors(count, seed)
        write(make_index(self.kind, ids, vectors, metric), self.path)
        self.remember(ids, vectors)
        self.reopen()

    def remember(self, ids: np.ndarray, vectors: Vectors) -> None:
        order = np.argsort(ids) if self.by_id else np.arange(len(ids))
        self.ids = ids[order]
        self.memory = MemoryStore(self.ids, vectors[order], self.metric)

    @rule()
    def reopen(self) -> None:
        self.store = FaissStore(self.path)

    @rule(seed=seeds, share=st.floats(0, 1), size=st.integers(1, 50))
    def replace(self, seed: int, share: float, size: int) -> None:
        rng = np.random.default_rng(seed)
        chosen = self.ids[rng.random(len(self.ids)) < share]
        vectors = self.vectors(len(chosen), seed)
        batches = [
            VectorBatch(ids=chosen[i : i + size], vectors=vectors[i : i + size])
            for i in range(0, len(chosen), size)
        ]
        replace(self.store, batches, lambda candidate: None)
        for batch in batches:
            self.memory.update(batch, lambda now: np.ones(len(now), np.bool_))

    @rule(seed=seeds)
    def refuse(self, seed: int) -> None:
        def refuse(candidate: VectorStore) -> None:
            raise LookupError

        batch = VectorBatch(ids=self.ids, vectors=self.vectors(len(self.ids), seed))
        try:
            replace(self.store, [batch], refuse)
        except LookupError:
            return
        raise AssertionError("the check's error was lost")

    @rule(seed=seeds, count=st.integers(1, 5))
    def application_adds_rows(self, seed: int, count: int) -> None:
        index = read(self.path)
        new = self.vectors(count, seed)
        if self.kind.positional:
            ids = np.arange(count) + len(self.ids)
            index.add(new)
        else:
            ids = np.arange(count) * 3 + int(self.ids.max()) + 3
            index.add_with_ids(new, ids)
        temporary = write(index, self.path.with_suffix(".app"))
        temporary.replace(self.path)
        _, vectors = self.rows(self.memory)
        self.remember(np.concatenate([self.ids, ids]), np.concatenate([vectors, new]))
        self.reopen()

    @rule(seed=seeds, k=st.integers(1, 60))
    def search(self, seed: int, k: int) -> None:
        queries = self.vectors(3, seed)
        found = self.store.search(queries, k, self.kind.params)
        expected = self.memory.search(queries, k, {})
        np.testing.assert_array_equal(np.isneginf(found.scores), np.isneginf(expected.scores))
        np.testing.assert_array_equal(found.ids, expected.ids)
        np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-4, atol=1e-4)

    @rule(seed=seeds, count=st.integers(0, 10))
    def fetch(self, seed: int, count: int) -> None:
        wanted = np.random.default_rng(seed).choice(self.ids, count)
        assert self.store.fetch(wanted).tobytes() == self.memory.fetch(wanted).tobytes()

    @precondition(lambda self: hasattr(self, "memory"))
    @invariant()
    def same_rows(self) -> None:
        ids, vectors = self.rows(self.store)
        expected_ids, expected = self.rows(self.memory)
        np.testing.assert_array_equal(ids, expected_ids)
        assert vectors.tobytes() == expected.tobytes()

    def rows(self, store: VectorStore) -> tuple[np.ndarray, Vectors]:
        batches = list(store.scan(9))
        return (
            np.concatenate([batch.ids for batch in batches]),
            np.concatenate([batch.vectors for batch in batches]),
        )


FileAgainstMemory.TestCase.settings = settings(
    max_examples=25,
    stateful_step_count=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
TestFileAgainstMemory = FileAgainstMemory.TestCase
