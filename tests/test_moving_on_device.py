from __future__ import annotations

import numpy as np
import pytest
import torch
from judged import Case, make_case

import simskip_vdb as ss
from simskip_vdb import moving_on_device, search_on_device, training
from simskip_vdb.datatypes import Mask, Metric, Positions, Vectors
from simskip_vdb.moving import Formula
from simskip_vdb.moving_on_device import OnDevice
from simskip_vdb.search_on_device import SearchOnDevice

DIM, ROWS = 24, 700


def formula(*, alpha: float = 0.7, beta: float = 0.5, away: float = 0.6) -> Formula:
    rng = np.random.default_rng(0)
    direction = rng.normal(size=DIM)
    origin = (away * direction / np.linalg.norm(direction)).astype(np.float32)[: DIM * bool(away)]

    def layer(wide: int, narrow: int) -> tuple[Vectors, Vectors]:
        weight = rng.normal(size=(wide, narrow)) / np.sqrt(narrow)
        return weight.astype(np.float32), rng.normal(size=wide).astype(np.float32)

    layers = (layer(DIM // 2, DIM), layer(DIM, DIM // 2), layer(DIM, DIM))
    offsets = rng.normal(size=(50, DIM)).astype(np.float32)
    return Formula.of(origin, layers, alpha, offsets, beta)


@pytest.fixture
def rows() -> tuple[Vectors, Positions, Mask]:
    rng = np.random.default_rng(1)
    x = (rng.normal(size=(ROWS, DIM)) * rng.lognormal(size=(ROWS, 1))).astype(np.float32)
    x[3], x[4, 0], x[5, 0] = 0, np.nan, np.inf
    x[6], x[7] = x[6] * 1e-22, x[7] * 1e19
    slots = np.where(rng.random(ROWS) < 0.3, rng.integers(0, 50, ROWS), -1)
    return x, slots, rng.random(ROWS) < 0.9


@pytest.mark.parametrize("piece", [64, 100_000])
@pytest.mark.parametrize("away", [0.0, 0.6])
@pytest.mark.parametrize(("alpha", "beta"), [(0.7, 0.5), (0.0, 0.5), (0.7, 0.0)])
def test_rows_move_as_on_the_cpu(
    rows: tuple[Vectors, Positions, Mask],
    monkeypatch: pytest.MonkeyPatch,
    alpha: float,
    beta: float,
    away: float,
    piece: int,
) -> None:
    monkeypatch.setattr(moving_on_device, "PIECE", piece)
    one = formula(alpha=alpha, beta=beta, away=away)
    expected = one.apply(*rows)
    found = OnDevice(one, "cpu").apply(*rows)
    x = rows[0]
    stays = (expected.view(np.uint32) == x.view(np.uint32)).all(axis=1)
    assert np.array_equal(found.view(np.uint32)[stays], x.view(np.uint32)[stays])
    assert not stays.all()
    distance = np.linalg.norm(found[~stays].astype(np.float64) - expected[~stays], axis=1)
    length = np.linalg.norm(expected[~stays].astype(np.float64), axis=1)
    assert (distance <= 2e-6 * length).all()


@pytest.fixture
def as_if_a_gpu(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let the CPU stand for another device, and count the blocks that went there."""
    blocks: list[int] = []

    class Counted(OnDevice):
        def __init__(self, formula: Formula, device: str) -> None:
            super().__init__(formula, "cpu")

        def apply(
            self, x: Vectors, slots: Positions, move: Mask, f: Vectors | None = None
        ) -> Vectors:
            blocks.append(len(x))
            return super().apply(x, slots, move, f)

    class Searching(SearchOnDevice):
        def __init__(
            self, queries: Vectors, k: int, metric: Metric, skip: Mask | None, device: str
        ) -> None:
            assert device == "other"
            super().__init__(queries, k, metric, skip, "cpu")

    monkeypatch.setattr(moving_on_device, "OnDevice", Counted)
    monkeypatch.setattr(search_on_device, "SearchOnDevice", Searching)
    monkeypatch.setattr(training, "device_of", lambda name: "cpu" if name == "cpu" else "other")
    return blocks


def test_a_run_refines_where_it_computes(
    as_if_a_gpu: list[int], tmp_path_factory: pytest.TempPathFactory, tmp_path: object
) -> None:
    case: Case = make_case(tmp_path_factory.mktemp("device"))
    judgments = ss.read_judgments(case.files)
    refiner_folder = case.folder / "refiner"
    before = case.index.read_bytes()
    ss.fit(ss.open_store(str(case.index)), judgments, ss.Settings(out=refiner_folder))
    assert not as_if_a_gpu
    settings = ss.Settings(refiner=refiner_folder, fit=ss.FitSettings(device="cuda"))
    report = ss.refine(ss.open_store(str(case.index)), judgments, settings)
    assert report.written is not None
    assert as_if_a_gpu
    again = ss.refine(
        ss.open_store(str(case.index)), judgments, ss.Settings(refiner=refiner_folder)
    )
    assert again.written is not None
    assert again.written["sent"] == 0  # the CPU's last digits are no reason to write
    ss.rollback(ss.open_store(str(case.index)))
    assert case.index.read_bytes() == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_rows_move_on_a_gpu_as_on_the_cpu(rows: tuple[Vectors, Positions, Mask]) -> None:
    x, slots, move = rows
    expected = formula().apply(x, slots, move)
    found = OnDevice(formula(), "cuda").apply(x, slots, move)
    sound = np.isfinite(x).all(axis=1)
    np.testing.assert_allclose(found[sound], expected[sound], rtol=1e-4, atol=1e-5)
