"""Checksums that Hadoop and Spark keep beside Parquet files fit whatever file is there."""

from __future__ import annotations

import os
import stat
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from builders import random_refiner
from parquet_files import write_rows

import simskip_vdb as ss
from simskip_vdb import Settings
from simskip_vdb.connectors import open_store
from simskip_vdb.connectors.checksums import checksum_follows
from simskip_vdb.connectors.parquet_file import ParquetFile
from simskip_vdb.connectors.swap import NEW, staged
from simskip_vdb.errors import StoreError
from simskip_vdb.judgments import Judgments

N, D = 40, 8


def beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.crc")


def checksum(path: Path, size: int = 512) -> bytes:
    data = path.read_bytes()
    sums = [zlib.crc32(data[at : at + size]) for at in range(0, len(data), size)]
    return b"crc\0" + struct.pack(">i", size) + b"".join(struct.pack(">I", s) for s in sums)


@pytest.fixture
def folder(tmp_path: Path, rng: np.random.Generator) -> Path:
    """Two files of a folder, each with its checksum; one is in larger chunks."""
    folder = tmp_path / "rows"
    folder.mkdir()
    rows = rng.normal(size=(N, D)).astype(np.float32)
    for number, part in enumerate((slice(0, 15), slice(15, N))):
        path = write_rows(folder / f"part-{number}.parquet", np.arange(N)[part], rows[part])
        beside(path).write_bytes(checksum(path, size=(512, 700)[number]))
        beside(path).chmod(0o640)
    random_refiner(D, np.arange(N)).save(tmp_path / "refiner")
    return folder


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("[!.]*.parquet"))


def assert_fit(folder: Path) -> None:
    for number, path in enumerate(files(folder)):
        assert beside(path).read_bytes() == checksum(path, size=(512, 700)[number])
        assert stat.S_IMODE(beside(path).stat().st_mode) == 0o640
    left = {path.name for path in folder.iterdir()}
    assert left == {n for p in files(folder) for n in (p.name, beside(p).name)} | {
        name for name in left if ".simskip" in name and not name.endswith("simskip-new")
    }


def settings(folder: Path) -> Settings:
    return Settings(refiner=folder.parent / "refiner", accept_unmeasured=True)


@pytest.mark.parametrize("single", [False, True])
def test_checksums_fit_after_refine_and_rollback(folder: Path, single: bool) -> None:
    uri = f"parquet:{files(folder)[0] if single else folder}?metric=dot"
    before = [path.read_bytes() for path in files(folder)]
    ss.refine(open_store(uri), Judgments(), settings(folder))
    assert files(folder)[0].read_bytes() != before[0]
    assert_fit(folder)
    ss.rollback(open_store(uri))
    assert_fit(folder)
    if single:
        assert files(folder)[0].read_bytes() == before[0]


def staged_name(target: Path) -> Path:
    return target.with_name(f".{target.name}.{NEW}-0badcafe")


@pytest.mark.parametrize("swapped", [False, True])
def test_a_kill_between_file_and_checksum_is_made_good(folder: Path, swapped: bool) -> None:
    path = files(folder)[0]
    staged_name(beside(path)).write_bytes(beside(path).read_bytes()[:12])
    staged_name(beside(path)).chmod(0o640)
    beside(path).unlink()
    if swapped:
        os.replace(files(folder)[1], path)
        last = path.with_name("part-1.parquet")
        write_rows(last, np.arange(3), np.eye(3, D, dtype=np.float32))
        beside(last).write_bytes(checksum(last, 700))
        beside(last).chmod(0o640)
    ParquetFile(path).sweep()
    assert_fit(folder)


def test_a_leftover_beside_a_checksum_is_removed(folder: Path) -> None:
    path = files(folder)[0]
    staged_name(beside(path)).write_bytes(b"half of it")
    ParquetFile(path).sweep()
    assert_fit(folder)


def test_a_file_that_is_not_swapped_keeps_its_checksum(folder: Path) -> None:
    path = files(folder)[0]

    def fail(temporary: Path) -> None:
        with checksum_follows(path, temporary):
            assert not beside(path).exists()
            raise OSError(28, "No space left on device")

    with staged(path) as temporary:
        temporary.write_bytes(b"another")
        with pytest.raises(StoreError):
            fail(temporary)
    assert_fit(folder)


def test_other_files_of_that_name_are_left_alone(folder: Path) -> None:
    path = files(folder)[0]
    beside(path).write_bytes(b"somebody else's")
    inode = beside(path).stat().st_ino
    uri = f"parquet:{folder}?metric=dot"
    ss.refine(open_store(uri), Judgments(), settings(folder))
    assert beside(path).read_bytes() == b"somebody else's"
    assert beside(path).stat().st_ino == inode
