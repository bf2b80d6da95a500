"""What a file carries beside its bytes comes back with it: extended attributes and ACLs."""

from __future__ import annotations

import errno
import os
import stat
import struct
from pathlib import Path

import numpy as np
import pytest
from builders import flat, random_refiner
from parquet_files import write_rows

import simskip_vdb as ss
from simskip_vdb import Settings
from simskip_vdb.connectors import open_store
from simskip_vdb.connectors.swap import staged, take_mode_and_owner
from simskip_vdb.errors import StoreError
from simskip_vdb.judgments import Judgments

N, D = 40, 8
Tags = tuple[dict[str, bytes], int]


def access_list(user: int) -> bytes:
    """Return an ACL by which one more user may read: rw for the owner, r for the group."""
    everybody = 0xFFFFFFFF
    entries = [(1, 6, everybody), (2, 4, user), (4, 4, everybody), (16, 4, everybody)]
    entries.append((32, 0, everybody))
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


def tags(path: Path) -> Tags:
    held = {name: os.getxattr(path, name) for name in os.listxattr(path)}
    return held, stat.S_IMODE(path.stat().st_mode)


def tag(path: Path, user: int) -> None:
    try:
        os.setxattr(path, "user.note", f"note {user}".encode())
        os.setxattr(path, "system.posix_acl_access", access_list(user))
    except (AttributeError, OSError) as error:
        pytest.skip(f"no extended attributes or ACLs here: {error}")


def files_of(kind: str, folder: Path, rng: np.random.Generator) -> tuple[str, list[Path]]:
    rows = rng.normal(size=(N, D)).astype(np.float32)
    half, ids = N // 2, np.arange(N)
    if kind == "FAISS":
        return str(flat(folder / "rows.faiss", rows)), [folder / "rows.faiss"]
    if kind == "FAISS parts":
        paths = [flat(folder / f"part{i}.faiss", part) for i, part in enumerate(np.split(rows, 2))]
        return f"faiss:{folder}/part*.faiss", paths
    if kind == "Parquet":
        path = write_rows(folder / "rows.parquet", ids, rows)
        return f"parquet:{path}?metric=dot", [path]
    paths = [
        write_rows(folder / f"{i}.parquet", ids[part], rows[part])
        for i, part in enumerate((slice(half), slice(half, N)))
    ]
    return f"parquet:{folder}?metric=dot", paths


@pytest.mark.parametrize("kind", ["FAISS", "FAISS parts", "Parquet", "Parquet folder"])
def test_attributes_and_access_lists_stay(
    kind: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    folder = tmp_path / "index"
    folder.mkdir()
    uri, paths = files_of(kind, folder, rng)
    for number, path in enumerate(paths):
        tag(path, 1234 + number)
    before = [tags(path) for path in paths]
    assert all(len(held) == 2 for held, _ in before)
    random_refiner(D, np.arange(N)).save(tmp_path / "refiner")
    asked = Settings(refiner=tmp_path / "refiner", accept_unmeasured=True)
    inodes = [path.stat().st_ino for path in paths]
    ss.refine(open_store(uri), Judgments(), asked)
    assert all(a != path.stat().st_ino for a, path in zip(inodes, paths, strict=True))
    assert [tags(path) for path in paths] == before
    ss.rollback(open_store(uri))
    assert [tags(path) for path in paths] == before


def test_a_folder_lends_a_file_no_access_list(tmp_path: Path, rng: np.random.Generator) -> None:
    """A file without an ACL has none afterwards, whatever its folder gives new files."""
    path = flat(tmp_path / "rows.faiss", rng.normal(size=(N, D)).astype(np.float32))
    path.chmod(0o600)
    try:
        os.setxattr(tmp_path, "system.posix_acl_default", access_list(1234))
    except (AttributeError, OSError) as error:
        pytest.skip(f"no ACLs here: {error}")
    with staged(path) as temporary:
        assert tags(temporary)[0]
        take_mode_and_owner(temporary, path)
        assert tags(temporary) == tags(path) == ({}, 0o600)


def test_an_attribute_that_cannot_be_kept_is_refused(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = flat(tmp_path / "rows.faiss", rng.normal(size=(N, D)).astype(np.float32))
    tag(path, 1234)

    def not_permitted(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "setxattr", not_permitted)
    before = path.read_bytes()
    random_refiner(D, np.arange(N)).save(tmp_path / "refiner")
    asked = Settings(refiner=tmp_path / "refiner", accept_unmeasured=True)
    with pytest.raises(StoreError, match="posix_acl_access"):
        ss.refine(open_store(str(path)), Judgments(), asked)
    assert path.read_bytes() == before
    assert not list(tmp_path.glob(".rows*"))


def test_without_extended_attributes_nothing_is_asked(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = flat(tmp_path / "rows.faiss", rng.normal(size=(N, D)).astype(np.float32))

    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOTSUP, "not supported")

    monkeypatch.setattr(os, "listxattr", unsupported, raising=False)
    with staged(path) as temporary:
        take_mode_and_owner(temporary, path)
    monkeypatch.delattr(os, "listxattr")
    with staged(path) as temporary:
        take_mode_and_owner(temporary, path)
