"""What is lost or damaged of a state is told for what it is, in few words, and loses nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from builders import ivf, random_refiner
from own_index import D, Index
from parquet_files import write_rows

import simskip_vdb as ss
from simskip_vdb.connectors import open_store
from simskip_vdb.errors import LONGEST, ConfigError, JournalError, SimskipError
from simskip_vdb.gate import Decision
from simskip_vdb.journal import Journal
from simskip_vdb.state_place import state_folder
from simskip_vdb.through_index import RefusedError, ThroughIndex

N = 120
IDS = np.arange(N) * 7 + 3
VECTORS = np.random.default_rng(3).normal(size=(N, D)).astype(np.float32)


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 64]) + data[at + 1 :]


DAMAGE: dict[str, Callable[[bytes], bytes | None]] = {
    "gone": lambda _: None,
    "empty": lambda _: b"",
    "cut": lambda data: data[: len(data) // 2],
    "one bit": lambda data: flipped(data, len(data) // 2),
    "nested": lambda _: b"[" * 100_000,
    "number": lambda _: b"5",
    "text": lambda _: b'"x"',
}


class Refined(Index):
    """A refined index, and what takes it and its state back to how they are now."""

    def __init__(self, folder: Path, kind: str) -> None:
        (folder / "world").mkdir()
        super().__init__(folder / "world", kind, N)
        self.refine("X")
        self._copy = folder / "copy"
        shutil.copytree(self.folder, self._copy)

    def again(self) -> None:
        shutil.rmtree(self.folder)
        shutil.copytree(self._copy, self.folder)

    @property
    def state(self) -> Path:
        with self.store() as store:
            return state_folder(store, None)

    def files(self) -> Iterator[Path]:
        for path in sorted(self.state.rglob("*")):
            if path.is_file() and path.stat().st_size:
                yield path.relative_to(self.state)


def failure_of(command: Callable[[], object]) -> SimskipError | None:
    try:
        command()
    except SimskipError as error:
        return error
    return None


@pytest.fixture(params=["ivf", "parquet", "edge"])
def index(request: pytest.FixtureRequest, tmp_path: Path) -> Refined:
    return Refined(tmp_path, request.param)


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_told_for_what_it_is_and_loses_nothing(index: Refined, damage: str) -> None:
    refined, told = index.array(), set()
    for name in list(index.files()):
        for command in (partial(index.refine, "X"), index.rollback):
            index.again()
            path = index.state / name
            whole = path.read_bytes()
            data = DAMAGE[damage](whole)
            path.unlink() if data is None else path.write_bytes(data)
            error = failure_of(command)
            if error is not None:
                assert not isinstance(error, ConfigError), (name, error)
                assert len(str(error)) < LONGEST
                told.add(name.name.partition("-")[0])
                assert np.array_equal(index.array(), refined), name
                path.parent.mkdir(exist_ok=True, parents=True)
                path.write_bytes(whole)
                index.rollback()
            else:
                same = index.array()
                assert np.array_equal(same, VECTORS) or np.array_equal(same, refined), name
                if np.array_equal(same, refined):
                    index.rollback()
            assert np.array_equal(index.array(), VECTORS), name
    assert {"originals", "manifest.json"} <= told


def test_digests_and_originals_suffice_where_the_refiner_is_lost(index: Refined) -> None:
    shutil.rmtree(index.state / "refiners")
    index.rollback()
    assert np.array_equal(index.array(), VECTORS)


def test_a_lost_manifest_is_no_index_that_was_never_refined(index: Refined) -> None:
    (index.state / "manifest.json").unlink()
    for command in (ss.rollback, ss.prune):
        with (
            index.store() as store,
            pytest.raises(JournalError, match=r"manifest\.json is missing"),
        ):
            command(store)


def test_a_list_of_known_rows_that_an_earlier_version_wrote_is_read(index: Refined) -> None:
    import pyarrow as pa

    with index.store() as store:
        info = store.info()
    journal = Journal(index.state, info)
    (refiner,) = (path.name for path in journal.refiners.iterdir())
    path, known = journal.refiners / refiner / "known.arrow", journal.known(refiner)
    assert known is not None
    table = pa.ipc.open_stream(path.read_bytes()).read_all()
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table)
    read = Journal(index.state, info).known(refiner)
    assert read is not None
    assert read.fingerprint == known.fingerprint


@pytest.mark.parametrize(("folder", "file"), [(0o755, 0o600), (0o700, 0o600), (0o2770, 0o660)])
def test_originals_are_read_by_nobody_who_could_not_write_the_state(
    tmp_path: Path, folder: int, file: int
) -> None:
    ivf(tmp_path / "index", IDS, VECTORS)
    random_refiner(D, IDS, 1).save(tmp_path / "X")
    state = tmp_path / "state"
    state.mkdir()
    state.chmod(folder)
    settings = ss.Settings(refiner=tmp_path / "X", accept_unmeasured=True, state=state)
    ss.refine(open_store(f"faiss:{tmp_path / 'index'}"), ss.Judgments(), settings)
    rows = [*state.glob("*.arrow"), *state.rglob("known.arrow")]
    assert len(rows) == 3
    assert {path.stat().st_mode & 0o777 for path in rows if path.parent == state} == {file}


def test_a_message_is_no_longer_than_people_read() -> None:
    assert len(str(SimskipError("x" * 10**6))) < LONGEST + 50
    assert str(SimskipError("x" * 10)) == "x" * 10


@pytest.mark.parametrize("history", ['"x"', "[5]", '{"a": 1}'])
def test_a_history_that_is_none_is_damage(index: Refined, history: str) -> None:
    path = index.state / "manifest.json"
    told = json.loads(path.read_bytes())
    path.write_text(json.dumps({**told, "history": json.loads(history)}))
    with (
        index.store() as store,
        pytest.raises(JournalError, match="json cannot be read"),
    ):
        ss.status(store)


def test_an_undone_write_needs_no_refiner_of_the_one_before(index: Refined) -> None:
    refined = index.array()
    shutil.rmtree(index.state / "refiners")

    def refuse(*_: object) -> None:
        raise RefusedError(Decision(passed=False, look=None, reasons=("no",)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ThroughIndex, "accept", refuse)
        report = index.refine("Y")
    assert report.exit_code == 3
    assert np.array_equal(index.array(), refined)
    with index.store() as store:
        assert not ss.status(store)["interrupted"]
    index.rollback()
    assert np.array_equal(index.array(), VECTORS)


def test_a_state_of_a_long_name_is_set_aside(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 240)
    random_refiner(D, IDS, 1).save(tmp_path / "X")
    settings = ss.Settings(refiner=tmp_path / "X", accept_unmeasured=True)
    ivf(path, IDS, VECTORS)
    ss.refine(open_store(str(path)), ss.Judgments(), settings)
    ss.rollback(open_store(str(path)))
    wider = np.concatenate([VECTORS, VECTORS], axis=1)
    ivf(path, IDS, wider)
    random_refiner(2 * D, IDS, 1).save(tmp_path / "Y")
    again = replace(settings, refiner=tmp_path / "Y")
    assert ss.refine(open_store(str(path)), ss.Judgments(), again).written is not None


def test_a_pointer_that_is_no_text_is_damage(tmp_path: Path) -> None:
    path = ivf(tmp_path / "index", IDS, VECTORS)
    random_refiner(D, IDS, 1).save(tmp_path / "X")
    settings = ss.Settings(
        refiner=tmp_path / "X", accept_unmeasured=True, state=tmp_path / "elsewhere"
    )
    ss.refine(open_store(str(path)), ss.Judgments(), settings)
    (tmp_path / "index.simskip" / "state-is-elsewhere").write_bytes(b"/no\xff\0where")
    with pytest.raises(JournalError):
        ss.rollback(open_store(str(path)))


def test_a_state_elsewhere_knows_an_address_that_was_written_otherwise(tmp_path: Path) -> None:
    """Earlier versions left ``%`` in the addresses of Parquet files as it is."""
    path = tmp_path / "50%"
    write_rows(path, IDS, VECTORS)
    random_refiner(D, IDS, 1).save(tmp_path / "X")
    state = tmp_path / "elsewhere"
    settings = ss.Settings(refiner=tmp_path / "X", accept_unmeasured=True, state=state)
    uri = f"parquet:{tmp_path}/50%25?metric=dot"
    ss.refine(open_store(uri), ss.Judgments(), settings)
    told = (state / "manifest.json").read_text()
    assert "50%25" in told
    (state / "manifest.json").write_text(told.replace("50%25", "50%"))
    ss.rollback(open_store(uri))
    assert np.array_equal(
        np.stack([v for b in open_store(uri).scan(N) for v in b.vectors]), VECTORS
    )
