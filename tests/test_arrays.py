"""Arrays in files: refined where they are, brought back to the byte, or refused by name."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from array_files import COARSE, KINDS, arrays_in, numbers_of, write_array
from builders import clusters, random_refiner
from click.testing import CliRunner
from faiss_files import replace
from safetensors.numpy import save_file

import simskip_vdb as ss
from simskip_vdb.cli import cli
from simskip_vdb.connectors import full_address, open_store, scheme_of
from simskip_vdb.connectors.array_store import ArrayFile
from simskip_vdb.datatypes import Ids, Metric, VectorBatch, id_names
from simskip_vdb.errors import (
    ConfigError,
    DataError,
    SimskipError,
    StoreError,
    StoreNotFoundError,
    UnsupportedIndexError,
)

N, D = 50, 6


@pytest.fixture
def numbers(rng: np.random.Generator) -> Any:  # noqa: ANN401 float64
    return rng.normal(size=(N, D))


def path_of(uri: str) -> Path:
    return Path(uri.partition(":")[2].partition("?")[0])


def ids_of(uri: str) -> Ids:
    return np.concatenate([batch.ids for batch in open_store(uri).scan(7)])


def refine(uri: str, place: Path, seed: int = 0) -> None:
    ids, path = np.sort(ids_of(uri)), place / f"refiner-{seed}"
    random_refiner(D, ids, seed, metric=Metric.COSINE).save(path)
    settings = ss.Settings(refiner=path, accept_unmeasured=True)
    report = ss.refine(open_store(uri), ss.Judgments(), settings)
    assert report.written is not None
    assert report.written["rows"] == N


@pytest.mark.parametrize("key", ["ids", "positions"])
@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back_to_the_byte(
    tmp_path: Path,
    numbers: Any,  # noqa: ANN401
    kind: str,
    key: str,
) -> None:
    uri = write_array(tmp_path, kind, np.arange(N) * 5 if key == "ids" else None, numbers)
    path = path_of(uri)
    before, arrays = path.read_bytes(), arrays_in(path)
    info = open_store(uri).info()
    assert (info.count, info.dim, info.positional) == (N, D, key == "positions")
    assert info.exact is not any(word in kind for word in COARSE)
    refine(uri, tmp_path)
    after = arrays_in(path)
    refiner = ss.Refiner.load(tmp_path / "refiner-0")
    wanted = refiner.refine_rows(arrays["emb"].astype(np.float32), ids_of(uri))
    np.testing.assert_allclose(
        after["emb"].astype(np.float32), wanted, atol=1e-6 if info.exact else 2e-2
    )
    assert after["emb"].dtype == arrays["emb"].dtype
    assert after["emb"].flags.f_contiguous == arrays["emb"].flags.f_contiguous
    assert [*after] == [*arrays]
    assert all(np.array_equal(after[name], arrays[name]) for name in arrays if name != "emb")
    if path.suffix != ".npz":
        start = len(before) - arrays["emb"].nbytes if path.suffix == ".npy" else 8
        assert path.read_bytes()[:start] == before[:start]
        assert path.stat().st_size == len(before)
    assert ss.status(open_store(uri))["refined"]["refiner"]
    assert ss.rollback(open_store(uri))["exact"]
    assert path.read_bytes() == before


@pytest.mark.parametrize("key", ["ids", "positions"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if "packed" not in kind])
def test_rows_come_back_one_by_one(
    tmp_path: Path,
    numbers: Any,  # noqa: ANN401
    kind: str,
    key: str,
) -> None:
    """An application that changes a row keeps the file of before from being put back."""
    uri = write_array(tmp_path, kind, np.arange(N) * 5 if key == "ids" else None, numbers)
    path = path_of(uri)
    before = arrays_in(path)["emb"]
    refine(uri, tmp_path)
    refine(uri, tmp_path, 1)
    held = np.array(arrays_in(path)["emb"])
    held[7] = numbers_of(kind, numbers[7:8] + 3)[0]
    shutil.rmtree(tmp_path / "new", ignore_errors=True)
    (tmp_path / "new").mkdir()
    given = np.asfortranarray(held) if "columns" in kind else held
    new = write_array(tmp_path / "new", kind, np.arange(N) * 5 if key == "ids" else None, given)
    shutil.copyfile(path_of(new), path)
    ss.rollback(open_store(uri))
    after = arrays_in(path)["emb"]
    assert np.array_equal(np.delete(after, 7, 0), np.delete(before, 7, 0))
    assert np.array_equal(after[7], held[7])


def test_a_gain_is_proven_and_written(tmp_path: Path, rng: np.random.Generator) -> None:
    docs, asked, rows, groups = clusters(rng, 600, 200)
    path = tmp_path / "embeddings.npy"
    np.save(path, docs.astype(np.float16))
    (tmp_path / "labels.txt").write_text("\n".join(map(str, rows)))
    np.save(tmp_path / "q.npy", asked)
    (tmp_path / "ql.txt").write_text("\n".join(map(str, groups)))
    before = path.read_bytes()
    options = [
        *("--labels", str(tmp_path / "labels.txt"), "--test-queries", str(tmp_path / "q.npy")),
        *("--test-labels", str(tmp_path / "ql.txt"), "--test-query-ids", str(tmp_path / "qi.txt")),
    ]
    (tmp_path / "qi.txt").write_text("\n".join(f"q{i}" for i in range(len(asked))))
    run = CliRunner().invoke(cli, ["refine", str(path), *options], standalone_mode=False)
    assert run.exit_code == 0, run.output
    assert "written: 600 rows" in run.output
    assert "Reload your application" in run.output
    assert path.read_bytes() != before
    assert CliRunner().invoke(cli, ["rollback", str(path)], standalone_mode=False).exit_code == 0
    assert path.read_bytes() == before


def test_each_array_has_a_state_of_its_own(tmp_path: Path, numbers: Any) -> None:  # noqa: ANN401
    path = tmp_path / "rows.npz"
    np.savez(path, a=numbers, b=-numbers)
    before = arrays_in(path)
    refine(f"npz:{path}?key=a", tmp_path)
    refine(f"npz:{path}?key=b", tmp_path)
    states = [open_store(f"npz:{path}?key={key}").info().state for key in "ab"]
    assert len({*states}) == 2
    for key in "ba":
        ss.rollback(open_store(f"npz:{path}?key={key}"))
    after = arrays_in(path)
    assert all(np.array_equal(after[key], before[key]) for key in "ab")


@pytest.mark.parametrize(
    ("name", "content", "shown"),
    [
        ("ids.txt", "straße-0\n007\n" + "".join(f"r{i}\n" for i in range(N - 2)), "straße-0"),
        ("ids.txt", "".join(f"{i - 9}\r\n" for i in range(N)), "-9"),
        ("ids.npy", np.array([f"straße-{i}" for i in range(N)]), "straße-0"),
        ("ids.npy", np.array([b"x%d" % i for i in range(N)]), "x0"),
        ("ids.npy", np.arange(N, dtype=np.uint64) + 2**63, str(2**63)),
        ("ids.npy", np.arange(N, dtype=np.int8)[:, None] - 20, "-20"),
    ],
)
def test_ids_in_a_file_beside(
    tmp_path: Path,
    numbers: Any,  # noqa: ANN401
    name: str,
    content: Any,  # noqa: ANN401
    shown: str,
) -> None:
    np.save(tmp_path / "rows.npy", numbers)
    if isinstance(content, str):
        (tmp_path / name).write_bytes(content.encode())
    else:
        np.save(tmp_path / name, content)
    uri = f"npy:{tmp_path}/rows.npy?ids={name}"
    assert id_names(ids_of(uri))[0] == shown
    before = (tmp_path / "rows.npy").read_bytes()
    refine(uri, tmp_path)
    assert ss.rollback(open_store(uri))["exact"]
    assert (tmp_path / "rows.npy").read_bytes() == before


def test_plain_paths_are_known_by_their_suffix(
    tmp_path: Path,
    numbers: Any,  # noqa: ANN401
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez("rows.npz", emb=numbers, first=np.arange(3))
    np.save("a b.npy", numbers)
    np.save("100%.npy", numbers)
    np.save("what?key=1.npy", numbers)
    for uri, wanted in [
        ("rows.npz", "npz:rows.npz"),
        ("./rows.npz?key=emb", "npz:./rows.npz?key=emb"),
        ("a b.npy", "npy:a b.npy"),
        ("100%.npy", "npy:100%25.npy"),
        ("what?key=1.npy", "npy:what%3Fkey=1.npy"),
        ("X.SafeTensors", "safetensors:X.SafeTensors"),
        ("x.parquet?id=sku", "parquet:x.parquet?id=sku"),
        ("x.faiss", "x.faiss"),
        ("part?.faiss", "part?.faiss"),
        ("npz:rows.npz", "npz:rows.npz"),
        ("qdrant://host:6333/x.npy", "qdrant://host:6333/x.npy"),
    ]:
        assert full_address(uri) == wanted
    assert scheme_of("rows.npz?key=emb") == "npz"
    for uri in ("rows.npz", "a b.npy", "100%.npy", "what?key=1.npy"):
        assert open_store(uri).info().count == N
    run = CliRunner().invoke(cli, ["inspect", "rows.npz?key=emb", "--json"])
    assert run.exit_code == 0, run.output


def _error(kind: type[SimskipError], match: str, uri: str) -> None:
    with pytest.raises(kind, match=match):
        open_store(uri)


def test_what_is_no_array_of_vectors_is_named(tmp_path: Path, numbers: Any) -> None:  # noqa: ANN401
    place = tmp_path
    np.savez(place / "two.npz", a=numbers, b=numbers, n=np.arange(3))
    _error(ConfigError, r"a \(vectors\).*\?key=a or \?key=b", f"npz:{place}/two.npz")
    _error(ConfigError, r"no array 'c'; it holds a", f"npz:{place}/two.npz?key=c")
    _error(UnsupportedIndexError, "'n' holds .*int64", f"npz:{place}/two.npz?key=n")
    _error(ConfigError, "'key'.*known: ids, metric", f"npy:{place}/x.npy?key=a")
    _error(ConfigError, "metric is cosine, dot or euclid", f"npz:{place}/two.npz?metric=hamming")
    save_file({"a": numbers, "b": numbers}, place / "two.safetensors")
    _error(ConfigError, r"F64 \(50, 6\).*\?key=a or", f"safetensors:{place}/two.safetensors")
    _error(StoreNotFoundError, "no such file", f"npy:{place}/gone.npy")
    for name, array in {"one": np.arange(3.0), "whole": np.eye(3, dtype=int),
                        "three": np.zeros((2, 2, 2)), "none": np.zeros((0, 3)),
                        "complex": np.eye(3) * 1j}.items():  # fmt: skip
        np.save(place / f"{name}.npy", array)
        _error(UnsupportedIndexError, "the array", f"npy:{place}/{name}.npy")
    np.save(place / "pickle.npy", np.array([{}, {}], object), allow_pickle=True)
    _error(UnsupportedIndexError, "holds object", f"npy:{place}/pickle.npy")
    shutil.copy(place / "two.npz", place / "two.npy")
    _error(StoreError, r"its address is npz:.*two\.npy", f"npy:{place}/two.npy")
    np.save(place / "rows.npy", numbers)
    shutil.copy(place / "rows.npy", place / "rows.npz")
    _error(StoreError, r"its address is npy:.*rows\.npz", f"npz:{place}/rows.npz")
    shutil.copy(place / "rows.npy", place / "rows.safetensors")
    _error(StoreError, r"its address is npy:", f"safetensors:{place}/rows.safetensors")
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    for scheme in ("npy", "npz", "safetensors"):
        (place / f"lfs.{scheme}").write_bytes(pointer)
        _error(StoreError, "git lfs pull", f"{scheme}:{place}/lfs.{scheme}")
        (place / f"empty.{scheme}").touch()
        _error(StoreError, "is empty", f"{scheme}:{place}/empty.{scheme}")


@pytest.mark.parametrize("kind", ["npy", "npz", "npz packed", "safetensors"])
def test_damage_is_told_from_data(tmp_path: Path, numbers: Any, kind: str) -> None:  # noqa: ANN401
    uri = write_array(tmp_path, kind, None, numbers)
    path = path_of(uri)
    whole = path.read_bytes()
    for size in range(0, len(whole), 37):
        path.write_bytes(whole[:size])
        with pytest.raises(SimskipError):
            open_store(uri)
    for place in range(0, min(len(whole), 400), 3):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        try:
            list(open_store(uri).scan(10))
        except SimskipError:
            continue


def test_ids_that_do_not_fit_are_refused(tmp_path: Path, numbers: Any) -> None:  # noqa: ANN401
    np.savez(tmp_path / "rows.npz", emb=numbers, few=np.arange(3), twice=np.arange(N) // 2,
             real=np.arange(N) / 2, blank=np.array(["", *map(str, range(N - 1))]))  # fmt: skip
    uri = f"npz:{tmp_path}/rows.npz?key=emb"
    _error(DataError, r"3 ids \(few\) for 50 rows", f"{uri}&ids=few")
    _error(DataError, r"25 ids \(such as 0\) of twice.*positions", f"{uri}&ids=twice")
    _error(StoreError, "array of float64", f"{uri}&ids=real")
    _error(DataError, "empty text", f"{uri}&ids=blank")
    _error(StoreNotFoundError, "neither an array of this file nor a file", f"{uri}&ids=gone")
    (tmp_path / "ids.txt").write_text("a\n\nb\n")
    _error(DataError, "line 2: it holds no id", f"{uri}&ids=ids.txt")


@pytest.mark.parametrize("kind", ["npy half", "safetensors brain"])
def test_numbers_that_do_not_fit_are_refused(
    tmp_path: Path,
    numbers: Any,  # noqa: ANN401
    kind: str,
) -> None:
    uri = write_array(tmp_path, kind, None, numbers)
    before, store = path_of(uri).read_bytes(), open_store(uri)
    assert isinstance(store, ArrayFile)
    large = VectorBatch(ids=np.array([3]), vectors=np.full((1, D), 3.4e38, np.float32))
    with pytest.raises(DataError, match="does not hold"):
        replace(store, [large], lambda _: None)
    assert path_of(uri).read_bytes() == before
