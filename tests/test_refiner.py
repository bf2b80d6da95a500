from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from builders import random_refiner
from hypothesis import given, settings
from hypothesis import strategies as st
from threadpoolctl import threadpool_info

from simskip_vdb import moving
from simskip_vdb.datatypes import Ids, Metric, Side, Vectors
from simskip_vdb.errors import ConfigError, DataError
from simskip_vdb.refiner import LateRule, Refiner

DIM = 12
IDS = np.arange(100, 160, 2)


@pytest.fixture
def rows(rng: np.random.Generator) -> Vectors:
    return (rng.normal(size=(len(IDS), DIM)) * rng.uniform(0.1, 9, (len(IDS), 1))).astype("f4")


@pytest.fixture(params=["about an origin", "about zero"])
def refiner(request: pytest.FixtureRequest) -> Refiner:
    made = random_refiner(DIM, IDS)
    return made if request.param == "about an origin" else replace(made, origin=made.origin[:0])


def slow_refined(refiner: Refiner, x: Vectors, row: int | None) -> Vectors:
    """The formula in float64, one row at a time."""
    origin = refiner.origin.astype(np.float64) if len(refiner.origin) else np.zeros(DIM)
    apart = x.astype(np.float64) / np.linalg.norm(x.astype(np.float64)) - origin
    direction = apart / np.linalg.norm(apart)
    (w1, b1), (w2, b2), (w3, b3) = refiner.layers
    moved = w3 @ np.maximum(w2 @ np.maximum(w1 @ direction + b1, 0) + b2, 0) + b3
    moved = direction + refiner.alpha * moved
    if row in refiner.offset_ids.tolist():
        moved = moved + refiner.beta * refiner.offsets[refiner.offset_ids.tolist().index(row)]
    moved = origin + np.linalg.norm(apart) * moved / np.linalg.norm(moved)
    return np.asarray(np.linalg.norm(x.astype(np.float64)) * moved / np.linalg.norm(moved))


def test_rows_follow_the_formula(refiner: Refiner, rows: Vectors) -> None:
    expected = [slow_refined(refiner, x, row) for x, row in zip(rows, IDS.tolist(), strict=True)]
    found = refiner.refine_rows(rows, IDS)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        np.linalg.norm(found, axis=1), np.linalg.norm(rows, axis=1), rtol=1e-6
    )


def test_order_of_rows_does_not_matter(
    refiner: Refiner, rows: Vectors, rng: np.random.Generator
) -> None:
    order = rng.permutation(len(rows))
    np.testing.assert_allclose(
        refiner.refine_rows(rows[order], IDS[order]),
        refiner.refine_rows(rows, IDS)[order],
        atol=1e-6,
    )


@pytest.mark.parametrize("block", [1, 7, 30])
def test_block_size_does_not_matter(
    refiner: Refiner, rows: Vectors, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    whole = refiner.refine_rows(rows, IDS)
    monkeypatch.setattr(moving, "PIECE", block)
    unit = np.linalg.norm(rows, axis=1, keepdims=True)
    np.testing.assert_allclose(refiner.refine_rows(rows, IDS) / unit, whole / unit, atol=1e-6)


def test_rows_without_an_offset_get_f_alone(refiner: Refiner, rows: Vectors) -> None:
    expected = [slow_refined(refiner, x, None) for x in rows]
    np.testing.assert_allclose(refiner.refine_rows(rows, IDS + 1), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_alpha_and_beta_zero_return_every_bit(dtype: str, seed: int) -> None:
    bits = np.random.default_rng(seed).integers(0, 256, (5, DIM * np.dtype(dtype).itemsize))
    with np.errstate(all="ignore"):
        x = bits.astype(np.uint8).view(dtype)
        still = replace(random_refiner(DIM, IDS), alpha=0.0, beta=0.0)
        assert still.is_identity
        found = still.refine_rows(x, IDS[:5])
        assert found.tobytes() == x.astype(np.float32).tobytes()


def test_rows_without_a_direction_return_every_bit(refiner: Refiner, rows: Vectors) -> None:
    rows[0], rows[3, 2], rows[5, 1], rows[7, 0] = 0, np.nan, np.inf, -np.inf
    rows[8] = -0.0
    broken = np.array([0, 3, 5, 7, 8])
    found = refiner.refine_rows(rows, IDS)
    assert found[broken].tobytes() == rows[broken].tobytes()
    sound = np.setdiff1d(np.arange(len(rows)), broken)
    assert (found[sound] != rows[sound]).any(axis=1).all()
    assert np.isfinite(found[sound]).all()


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_tiny_and_huge_rows_move_like_any_other(
    refiner: Refiner, rows: Vectors, scale: float
) -> None:
    scaled = (rows * np.float32(scale)).astype(np.float32)
    found = refiner.refine_rows(scaled, IDS) / np.float32(scale)
    np.testing.assert_allclose(found, refiner.refine_rows(rows, IDS), rtol=1e-4, atol=1e-4)


def test_a_row_that_would_overflow_stays_beside_one_that_is_not_finite() -> None:
    towards = np.array([[30, 0, 0, 0]], np.float32)
    one = Refiner(
        dim=4,
        side=Side.DOCS,
        metric=Metric.DOT,
        beta=1.0,
        offset_ids=np.array([1]),
        offsets=towards,
    )
    rows = np.array([[np.nan] * 4, [2.5e38] * 4], np.float32)
    found = one.refine_rows(rows, np.arange(2))
    assert np.array_equal(found.view(np.uint32), rows.view(np.uint32))


def test_a_direction_that_vanishes_stays(rows: Vectors) -> None:
    unit = np.zeros((1, DIM), dtype=np.float32)
    unit[0, 0] = 1
    refiner = Refiner(
        dim=DIM,
        side=Side.DOCS,
        metric=Metric.COSINE,
        beta=1.0,
        offset_ids=IDS[:1],
        offsets=-unit,
    )
    assert refiner.refine_rows(3 * unit, IDS[:1]).tolist() == (3 * unit).tolist()


def test_late_rows_stay_or_go_through_f(refiner: Refiner, rows: Vectors) -> None:
    late = np.arange(len(rows)) % 3 == 0
    raw = refiner.refine_rows(rows, IDS, late)
    assert raw[late].tobytes() == rows[late].tobytes()
    np.testing.assert_array_equal(raw[~late], refiner.refine_rows(rows, IDS)[~late])

    through_f = replace(refiner, late=LateRule.F).refine_rows(rows, IDS, late)
    expected = [slow_refined(refiner, x, None) for x in rows[late]]
    np.testing.assert_allclose(through_f[late], expected, atol=1e-5)
    np.testing.assert_array_equal(through_f[~late], raw[~late])


def test_queries_move_only_where_both_sides_do(refiner: Refiner, rows: Vectors) -> None:
    assert refiner(rows) is rows
    both = replace(refiner, side=Side.BOTH)
    expected = [slow_refined(both, x, None) for x in rows]
    np.testing.assert_allclose(both(rows), expected, atol=1e-5)


def test_another_dimension_names_both(refiner: Refiner) -> None:
    wrong = np.ones((2, 5), dtype=np.float32)
    with pytest.raises(DataError, match=r"\(2, 5\).*dimension 12"):
        refiner.refine_rows(wrong, IDS[:2])
    with pytest.raises(DataError, match=r"\(2, 5\).*dimension 12"):
        refiner(wrong)
    with pytest.raises(DataError, match="3 ids for 2 vectors"):
        refiner.refine_rows(np.ones((2, DIM)), IDS[:3])


def test_ids_of_another_kind_are_refused(refiner: Refiner, rows: Vectors) -> None:
    with pytest.raises(DataError, match=r"row ids are .*S\d+, .*int64"):
        refiner.refine_rows(rows, IDS.astype("S36"))


BIG = np.array([3, 2**53, 2**53 + 1, 2**64 - 1], dtype=np.uint64)


@pytest.mark.parametrize("ids", [IDS, BIG, np.array(["7", "b4e1", "e0", "ff"], "S36")])
def test_save_and_load_keep_every_bit(
    tmp_path: Path, rows: Vectors, rng: np.random.Generator, ids: Ids
) -> None:
    saved = replace(
        random_refiner(DIM, ids, side=Side.BOTH),
        late=LateRule.F,
        alpha=1 / 3,
        info={"signal": "judged", "seed": 5},
    )
    saved.save(tmp_path / "new" / "folder")
    loaded = Refiner.load(tmp_path / "new" / "folder")
    assert loaded.id == saved.id
    assert loaded.info == saved.info
    assert (loaded.alpha, loaded.late, loaded.side) == (1 / 3, LateRule.F, Side.BOTH)
    asked = rng.choice(ids, len(rows))
    assert loaded.refine_rows(rows, asked).tobytes() == saved.refine_rows(rows, asked).tobytes()
    without = replace(saved, offset_ids=ids[:0])
    chosen = np.isin(asked, saved.offset_ids)
    moved = (saved.refine_rows(rows, asked) != without.refine_rows(rows, asked)).any(axis=1)
    assert moved.tolist() == chosen.tolist()


def test_id_changes_with_all_that_changes_the_result(refiner: Refiner) -> None:
    (weight, bias), *rest = refiner.layers
    variants = [
        refiner,
        replace(refiner, alpha=0.25),
        replace(refiner, beta=0.25),
        replace(refiner, side=Side.BOTH),
        replace(refiner, late=LateRule.F),
        replace(refiner, offsets=refiner.offsets * 2),
        replace(refiner, offset_ids=refiner.offset_ids + 1),
        replace(refiner, layers=((weight, bias + 1), *rest)),
        Refiner.identity(DIM),
    ]
    assert len({variant.id for variant in variants}) == len(variants)
    assert replace(refiner, info={"note": 1}).id == refiner.id
    assert all(len(variant.id) == 12 and int(variant.id, 16) >= 0 for variant in variants)


def test_no_refiner_says_what_is_missing(tmp_path: Path, refiner: Refiner) -> None:
    with pytest.raises(ConfigError, match=r"refiner\.json is missing"):
        Refiner.load(tmp_path)
    refiner.save(tmp_path)
    (tmp_path / "refiner.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"no refiner in .*missing"):
        Refiner.load(tmp_path)


def test_a_newer_schema_says_what_to_do(tmp_path: Path, refiner: Refiner) -> None:
    refiner.save(tmp_path)
    path = tmp_path / "refiner.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema": 3}))
    with pytest.raises(ConfigError, match=r"schema 3.*upgrade"):
        Refiner.load(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"alpha": 0.75},
        {"alpha": float("nan")},
        {"alpha": "much"},
        {"dim": DIM + 1},
        {"dim": None},
        {"side": "neither"},
        {"layers": 2},
        {"layers": 4},
        {"id": "0" * 12},
        {"offset_ids": "|S4"},
        {"offset_ids": "O"},
        {"info": None},
    ],
)
def test_damaged_settings_are_refused(
    tmp_path: Path, refiner: Refiner, change: dict[str, object]
) -> None:
    refiner.save(tmp_path)
    path = tmp_path / "refiner.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(DataError, match="is damaged"):
        Refiner.load(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"schema": 1}', "\x00\xff"])
def test_hostile_settings_are_refused(tmp_path: Path, refiner: Refiner, text: str) -> None:
    refiner.save(tmp_path)
    (tmp_path / "refiner.json").write_text(text, encoding="latin-1")
    with pytest.raises(DataError, match="is damaged"):
        Refiner.load(tmp_path)


@pytest.mark.parametrize("damage", ["cut", "empty", "nan", "shape", "dtype", "unsorted"])
def test_damaged_weights_are_refused(tmp_path: Path, refiner: Refiner, damage: str) -> None:
    refiner.save(tmp_path)
    path = tmp_path / "refiner.safetensors"
    tensors = safetensors.numpy.load_file(path)
    if damage == "nan":
        tensors["layers.1.weight"][0, 0] = np.nan
    elif damage == "shape":
        tensors["offsets"] = tensors["offsets"][:, :-1].copy()
    elif damage == "dtype":
        tensors["layers.0.weight"] = tensors["layers.0.weight"].astype(np.float16)
    elif damage == "unsorted":
        tensors["offset_ids"] = tensors["offset_ids"][::-1].copy()
    safetensors.numpy.save_file(tensors, path)
    if damage in ("cut", "empty"):
        path.write_bytes(path.read_bytes()[: 100 if damage == "cut" else 0])
    with pytest.raises(DataError, match="is damaged"):
        Refiner.load(tmp_path)


def test_files_hold_no_pickle(tmp_path: Path, refiner: Refiner) -> None:
    refiner.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "refiner.json",
        "refiner.safetensors",
    ]
    assert json.loads((tmp_path / "refiner.json").read_text())["schema"] == 2
    assert (tmp_path / "refiner.safetensors").read_bytes()[8:9] == b"{"


def test_saving_again_where_nothing_fits_leaves_what_was_saved(tmp_path: Path) -> None:
    made = random_refiner(16, np.arange(200))
    made.save(tmp_path / "r")
    code = (
        "import resource, sys; from simskip_vdb import Refiner;"
        "made = Refiner.load(sys.argv[1]);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500));"
        "made.save(sys.argv[1])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "r"], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "StoreError" in done.stderr
    assert Refiner.load(tmp_path / "r").id == made.id


def test_blocks_cut_at_pieces_give_the_same_bits(refiner: Refiner) -> None:
    rows = np.random.default_rng(5).normal(size=(3 * moving.PIECE + 7, DIM)).astype(np.float32)
    ids = np.arange(len(rows))
    whole = refiner.refine_rows(rows, ids)
    cut = [moving.PIECE, 2 * moving.PIECE]
    parts = zip(np.split(rows, cut), np.split(ids, cut), strict=True)
    assert np.concatenate([refiner.refine_rows(*part) for part in parts]).tobytes() == (
        whole.tobytes()
    )


def test_threads_of_blas_are_as_before(refiner: Refiner, rows: Vectors) -> None:
    before = [pool["num_threads"] for pool in threadpool_info()]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: refiner.refine_rows(rows, IDS), range(40)))
    assert [pool["num_threads"] for pool in threadpool_info()] == before
    assert all(each.tobytes() == found[0].tobytes() for each in found)


def test_offsets_alone_leave_other_rows_bit_for_bit(rows: Vectors) -> None:
    offsets = np.full((1, DIM), 0.5, np.float32)
    alone = Refiner(
        dim=DIM, side=Side.DOCS, metric=Metric.DOT, beta=1.0, offset_ids=IDS[:1], offsets=offsets
    )
    found = alone.refine_rows(rows, IDS)
    assert (found[0] != rows[0]).any()
    assert found[1:].tobytes() == rows[1:].tobytes()
