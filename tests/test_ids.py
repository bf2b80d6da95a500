"""Ids are text everywhere: one rule for what people write and what an index holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from uuid import UUID

import numpy as np
import pytest
from shared_data import Rows

from simskip_vdb.datatypes import Ids, id_forms, id_text
from simskip_vdb.judgments import JudgmentFiles, Judgments, read_judgments
from simskip_vdb.parsing import RowColumn
from simskip_vdb.placing import Notes, find_places
from simskip_vdb.resolution import resolve

N, D = 20, 4
UUIDS = [str(UUID(int=7**40 + i)) for i in range(N)]
FORMS: dict[str, Callable[[str], str]] = {
    "hyphens": str,
    "digits": lambda name: name.replace("-", ""),
    "urn": lambda name: f"urn:uuid:{name}",
    "braces": lambda name: f"{{{name}}}",
    "capitals": str.upper,
    "capital digits": lambda name: name.replace("-", "").upper(),
}


def rows(ids: Ids) -> Rows:
    return Rows(ids, np.random.default_rng(0).normal(size=(N, D)).astype(np.float32))


def judged(tmp_path: Path, ids: Ids, written: list[str], option: str) -> dict[str, int]:
    """Judge document i relevant for query i, naming rows as people wrote them; say which it is."""
    np.save(tmp_path / "q.npy", np.random.default_rng(1).normal(size=(N, D)).astype(np.float32))
    (tmp_path / "q.txt").write_text("".join(f"q{i}\n" for i in range(N)))
    docs = [f"d{i}" for i in range(N)] if option == "doc_ids" else written
    (tmp_path / "qrels.tsv").write_text("".join(f"q{i}\t{docs[i]}\t1\n" for i in range(N)))
    files = {"queries": "q.npy", "query_ids": "q.txt", "qrels": "qrels.tsv"}
    if option == "doc_ids":
        files[option] = "rows.tsv"
        lines = (f"{name}\td{i}\n" for i, name in enumerate(written))
        (tmp_path / "rows.tsv").write_text("".join(lines))
    given = JudgmentFiles(**{name: tmp_path / file for name, file in files.items()})
    found = resolve(read_judgments(given), rows(ids), seed=0, assigned={})
    assert not found.notes
    sets = [zip(part.ids, part.rows.tolist(), strict=True) for part in found.queries.values()]
    return {name: row for pairs in sets for name, row in pairs}


@pytest.mark.parametrize("option", ["qrels", "doc_ids"])
@pytest.mark.parametrize("held", FORMS)
@pytest.mark.parametrize("form", FORMS)
def test_a_uuid_is_one_in_every_form(tmp_path: Path, form: str, held: str, option: str) -> None:
    ids = id_text([FORMS[held](name).encode() for name in UUIDS])
    found = judged(tmp_path, ids, [FORMS[form](name) for name in UUIDS], option)
    assert found == {f"q{i}": i for i in range(N)}


NUMBERS = [0, 7, -1, -5, 2**63 - 1, -(2**63), *range(100, 114)]


@pytest.mark.parametrize("option", ["qrels", "doc_ids"])
@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize("text", [False, True])
def test_numbers_are_those_of_their_64_bits(
    tmp_path: Path, text: bool, unsigned: bool, option: str
) -> None:
    ids = np.array(NUMBERS, np.int64)
    held = id_text([str(number).encode() for number in NUMBERS]) if text else ids
    written = ids.astype(np.uint64) if unsigned else ids
    found = judged(tmp_path, held, [str(number) for number in written.tolist()], option)
    assert found == {f"q{i}": i for i in range(N)}


def test_labels_know_rows_in_every_form() -> None:
    ids = id_text([name.encode() for name in UUIDS])
    given = id_text([FORMS["capital digits"](name).encode() for name in UUIDS] + [b"7"])
    labels = RowColumn(source="labels", values=[*"ab" * (N // 2), "c"], row_ids=given)
    notes = Notes()
    found = find_places(Judgments(labels=labels), rows(ids), notes)
    assert found.groups is not None
    assert found.groups.tolist() == [0, 1] * (N // 2)
    assert [str(note) for note in notes.all] == ["labels: 1 index ids that no row has, such as 7"]


@pytest.mark.parametrize("name", ["7", "007", "+7", "sku-1", "1.0", "a" * 32 + "b", "{7}", ""])
def test_other_names_have_one_form(name: str) -> None:
    assert id_forms(name) == ()
