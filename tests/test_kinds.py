"""A file of another kind is told for what it is, whatever it was taken for."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import pickle
import sqlite3
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save_file

from simskip_vdb.connectors import open_store
from simskip_vdb.connectors.kinds import refuse_other_kinds
from simskip_vdb.errors import StoreError, UnsupportedIndexError

SCHEMES = ("faiss", "parquet", "npy", "npz", "safetensors", "llama-index")
ROWS = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)


def _database(path: Path) -> None:
    with sqlite3.connect(path) as data:
        data.execute("CREATE TABLE a (b)")
    data.close()


def _tar(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        archive.add(__file__, "a.py")


def _zip(name: str) -> Callable[[Path], Any]:
    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(name, "a")

    return write


def _faiss(path: Path) -> None:
    index = faiss.IndexFlatL2(4)
    index.add(ROWS)
    faiss.write_index(index, str(path))


def _bits(path: Path) -> None:
    index = faiss.IndexBinaryFlat(64)
    index.add(np.zeros((9, 8), np.uint8))
    faiss.write_index_binary(index, str(path))


def _npy(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, ROWS)


def _npz(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, rows=ROWS)


def _parquet(path: Path) -> None:
    column = pa.FixedSizeListArray.from_arrays(pa.array(ROWS.ravel()), 4)
    pq.write_table(pa.table({"id": range(5), "vector": column}), path)


def _json(path: Path) -> None:
    path.write_text(json.dumps({"embedding_dict": dict(zip("abcde", ROWS.tolist(), strict=True))}))


STORES: dict[str, Callable[[Path], Any]] = {
    "faiss": _faiss,
    "parquet": _parquet,
    "npy": _npy,
    "npz": _npz,
    "safetensors": lambda path: save_file({"rows": ROWS}, path),
    "llama-index": _json,
}
OTHERS: dict[str, Callable[[Path], Any]] = {
    "a binary index": _bits,
    "a gzip archive": lambda path: path.write_bytes(gzip.compress(b"a" * 99)),
    "a bzip2 archive": lambda path: path.write_bytes(bz2.compress(b"a" * 99)),
    "an? xz archive": lambda path: path.write_bytes(lzma.compress(b"a" * 99)),
    "a tar archive": _tar,
    "a zip archive": _zip("a.txt"),
    "a file of torch.save": _zip("model/data.pkl"),
    "a pickle": lambda path: path.write_bytes(pickle.dumps(ROWS)),
    "a SQLite database": _database,
    "an HDF5 file": lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(90)),
    "an Arrow file": lambda path: path.write_bytes(b"ARROW1\0\0" + bytes(90)),
    "a web page": lambda path: path.write_text("<!DOCTYPE html>\n<p>Rate limit exceeded: ß"),
    "a JSON file": lambda path: path.write_text("[1, 2]"),
    "a text file": lambda path: path.write_text("0.1 0.2 0.3\n" * 200 + "ß"),
}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", OTHERS)
def test_a_file_without_vectors_is_named(tmp_path: Path, kind: str, scheme: str) -> None:
    path = tmp_path / "given"
    OTHERS[kind](path)
    if scheme == "npz" and kind in ("a zip archive", "a file of torch.save"):
        pytest.skip("an archive may be one of NumPy's")
    with pytest.raises(UnsupportedIndexError, match=f"this is {kind}") as caught:
        open_store(f"{scheme}:{path}")
    assert "/project/" not in str(caught.value)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", STORES)
def test_a_store_of_another_kind_has_its_address_named(
    tmp_path: Path, kind: str, scheme: str
) -> None:
    path = tmp_path / "given"
    STORES[kind](path)
    if kind == scheme:
        assert open_store(f"{scheme}:{path}").info().count == 5
        return
    with pytest.raises(StoreError, match=rf"this is .*; its address is {kind}:{path}$"):
        open_store(f"{scheme}:{path}")
    assert open_store(f"{kind}:{path}").info().count == 5


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_stands_for_a_file_is_named(tmp_path: Path, scheme: str) -> None:
    path = tmp_path / "given"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(StoreError, match="git lfs pull"):
        open_store(f"{scheme}:{path}")
    path.write_bytes(b"")
    with pytest.raises(StoreError, match="the file is empty"):
        open_store(f"{scheme}:{path}")


def test_what_is_not_known_is_told_without_a_signature(tmp_path: Path) -> None:
    path = tmp_path / "given"
    path.write_bytes(bytes(range(128, 256)) * 9)
    refuse_other_kinds(path, "faiss", "faiss:given")
    with pytest.raises(StoreError, match=r"it does not begin as an index does$"):
        open_store(f"faiss:{path}")
    for size in (5, 40, 90):
        whole = tmp_path / "whole"
        _faiss(whole)
        path.write_bytes(whole.read_bytes()[:size])
        with pytest.raises(StoreError) as caught:
            open_store(f"faiss:{path}")
        assert not any(word in str(caught.value) for word in ("/project/", "::", "Error in"))
