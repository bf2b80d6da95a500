from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from simskip_vdb.rows import hash_ids, row_digests


def test_equal_rows_have_equal_digests_whatever_the_batch(rng: np.random.Generator) -> None:
    x = rng.normal(size=(3000, 33)).astype(np.float32)
    whole = row_digests(x)
    assert (np.concatenate([row_digests(x[i : i + 7]) for i in range(0, 3000, 7)]) == whole).all()
    assert len(np.unique(whole)) == 3000


@given(st.integers(0, 15), st.integers(0, 31))
def test_any_flipped_bit_changes_the_digest(place: int, bit: int) -> None:
    x = np.linspace(-1, 1, 16, dtype=np.float32)[None]
    y = x.copy()
    y.view(np.uint32)[0, place] ^= np.uint32(1 << bit)
    assert row_digests(x)[0] != row_digests(y)[0]


def test_swapped_words_change_the_digest() -> None:
    assert row_digests(np.array([[1, 2]], "f4"))[0] != row_digests(np.array([[2, 1]], "f4"))[0]


def test_the_bits_count_not_the_numbers() -> None:
    digests = row_digests(np.array([[0.0], [-0.0], [np.nan]], "f4"))
    assert len(np.unique(digests)) == 3
    assert row_digests(np.array([[np.nan]], "f4"))[0] == digests[2]


def test_ids_are_hashed_evenly_and_the_same_each_time() -> None:
    ids = np.arange(20_000)
    drawn = hash_ids(ids, 3) < np.uint64(0.1 * 2**64)
    assert 0.09 < drawn.mean() < 0.11
    assert (hash_ids(ids[::-1], 3)[::-1] == hash_ids(ids, 3)).all()
    assert (hash_ids(ids, 3) != hash_ids(ids, 4)).all()
