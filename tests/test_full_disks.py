"""A disk that is full or read-only indeed, below the engines too: the run ends, nothing is lost."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from small_index import Index

from simskip_vdb.errors import ConfigError

SIMSKIP = "import sys; from simskip_vdb.cli import main; sys.argv[0] = 'simskip'; main()"
ROWS = {"faiss": 3000, "edge": 400, "local": 30}


def simskip(index: Index, command: str, most: int | None = None) -> tuple[int, str]:
    """Run a command, whose files may have so many bytes at most; return its code and words."""
    arguments = [command, index.kind.uri(index.now)]
    if command == "refine":
        arguments += ["--refiner", str(index.refiner), "--accept-unmeasured"]

    def limit() -> None:
        if most is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

    done = subprocess.run(
        [sys.executable, "-c", SIMSKIP, *arguments],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=limit,
    )
    return done.returncode, done.stderr


def assert_whole(index: Index, failed: tuple[int, str]) -> None:
    """Look at what a run that failed left, go on by the same command, and go back."""
    code, said = failed
    # On a full disk, an engine that maps its files may be ended by the system, as by a kill.
    assert code in (1, -7), said
    assert code < 0 or "Traceback" not in said
    assert (index.is_old() | index.is_new()).all(), said


def go_on_and_back(index: Index, command: str) -> None:
    if command == "refine":
        index.refine()
        assert index.is_new().all()
    with suppress(ConfigError):  # nothing to roll back
        index.rollback()
    assert index.is_old().all()


@pytest.mark.parametrize("command", ["refine", "rollback"])
@pytest.mark.parametrize("kind", ["faiss", "edge", "local"])
def test_files_that_may_not_grow(kind: str, command: str, tmp_path: Path) -> None:
    index = Index(kind, tmp_path, ROWS[kind])
    failures = 0
    for most in (200, 5_000, 80_000):
        index.renew()
        if command == "rollback":
            index.refine()
        failed = simskip(index, command, most)
        if failed[0] != 0:
            failures += 1
            assert_whole(index, failed)
        go_on_and_back(index, command)
    assert failures > 0


@contextmanager
def disk(folder: Path, options: str) -> Iterator[None]:
    """Mount a small disk there, or skip where this user may not."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a disk")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


@pytest.mark.parametrize("command", ["refine", "rollback"])
@pytest.mark.parametrize("kind", ["faiss", "edge", "local"])
def test_a_disk_that_runs_full(kind: str, command: str, tmp_path: Path) -> None:
    index = Index(kind, tmp_path, ROWS[kind])
    shutil.rmtree(index.now)
    failures = 0
    for left in (0, 30, 200):
        with disk(index.now, "size=1g"):
            shutil.copytree(tmp_path / "first", index.now, dirs_exist_ok=True)
            if command == "rollback":
                index.refine()
            used = shutil.disk_usage(index.now).used // 1024
            remount(index.now, f"size={used + left}k")
            failed = simskip(index, command)
            if failed[0] != 0:
                failures += 1
                remount(index.now, "size=1g")
                assert_whole(index, failed)
            remount(index.now, "size=1g")
            go_on_and_back(index, command)
        index.now.rmdir()
    assert failures > 0


@pytest.mark.parametrize("command", ["refine", "rollback"])
@pytest.mark.parametrize("kind", ["faiss", "edge", "local"])
def test_a_disk_that_may_not_be_written(kind: str, command: str, tmp_path: Path) -> None:
    index = Index(kind, tmp_path, ROWS[kind])
    shutil.rmtree(index.now)
    with disk(index.now, "size=1g"):
        shutil.copytree(tmp_path / "first", index.now, dirs_exist_ok=True)
        if command == "rollback":
            index.refine()
        remount(index.now, "ro")
        failed = simskip(index, command)
        remount(index.now, "rw")
        assert_whole(index, failed)
        go_on_and_back(index, command)


def test_a_read_only_state_folder_is_named(tmp_path: Path) -> None:
    index = Index("faiss", tmp_path)
    blocked = tmp_path / "blocked"
    blocked.write_bytes(b"a file where the folder would be")
    arguments = ["refine", index.kind.uri(index.now), "--state", str(blocked / "state")]
    arguments += ["--refiner", str(index.refiner), "--accept-unmeasured"]
    done = subprocess.run(
        [sys.executable, "-c", SIMSKIP, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert str(blocked / "state") in done.stderr
    assert "--state" in done.stderr
    assert index.is_old().all()
    assert os.listdir(index.now) == ["x.faiss"]
