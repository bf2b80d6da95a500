from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simskip_vdb import toml_lines
from simskip_vdb.errors import ConfigError, MissingDependencyError
from simskip_vdb.toml_lines import Keys, Lines, read_toml

STATEMENTS: tuple[tuple[str, Keys], ...] = (
    ("{} = 1", ("{}",)),
    ("  {} = 'a # b'  # c", ("{}",)),
    ('"{}" = "]"', ("{}",)),
    ("'{} [x] = y' = true", ("{} [x] = y",)),
    ("{}.sub . 'k y' = 1.5", ("{}", "sub", "k y")),
    ("{} = {{ deep = {{ er = 2 }} }}", ("{}", "deep", "er")),
    ("{} = [\n  1, # ]\n\n  2,\n]", ("{}",)),
    ('{} = [\n  \']\',\n  """\n[no.table]\nno = 1\n""",\n]', ("{}",)),
    ('{} = """\n[no.table]\nno = 1 \\\n  \\"""\n"""', ("{}",)),
    ("{} = '''\n\"\"\"\nno = 1\n'''", ("{}",)),
    ("{} = 2020-01-01T00:00:00Z", ("{}",)),
    ("[{}]", ("{}",)),
    ('[ {} . "a.b" ] # x', ("{}", "a.b")),
    ("[[{}]]", ("{}",)),
)
"""Statements, and the longest of the ways that each mentions first."""


def write(path: Path, text: str) -> Lines:
    path.write_bytes(text.encode())
    return read_toml(path)[1]


@given(data=st.data(), ending=st.sampled_from(["\n", "\r\n"]), last=st.booleans())
def test_keys_have_the_line_that_they_were_put_on(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, ending: str, last: bool
) -> None:
    pieces = data.draw(st.lists(st.sampled_from(STATEMENTS), max_size=8))
    gaps = st.sampled_from(["", "# [no]\n", "\n\n", "\t\n# '''\n"])
    text, table = "", Keys()
    expected: dict[Keys, int] = {}
    for i, (form, way) in enumerate(pieces):
        text += data.draw(gaps)
        keys = tuple(key.format(f"k{i}") for key in way)
        here = keys if form.startswith("[") else table + keys
        line = text.count("\n") + 1
        expected |= {here[:n]: line for n in range(1, len(here) + 1) if here[:n] not in expected}
        table = here if form.startswith("[") else table
        text += form.format(f"k{i}") + "\n"
    text = text if last else text.rstrip("\n")
    path = tmp_path_factory.getbasetemp() / "lines.toml"
    assert write(path, text.replace("\n", ending)) == expected


def test_a_table_that_is_opened_late_keeps_its_first_mention(tmp_path: Path) -> None:
    lines = write(tmp_path / "x.toml", "[a.b]\nx = 1\n[a]\ny = 2\n[a.c]\nx = 3")
    assert lines == {
        ("a",): 1, ("a", "b"): 1, ("a", "b", "x"): 2, ("a", "y"): 4, ("a", "c"): 5,
        ("a", "c", "x"): 6,
    }  # fmt: skip


def test_a_byte_order_mark_is_passed_over(tmp_path: Path) -> None:
    assert write(tmp_path / "x.toml", "\ufeffa = 1\n") == {("a",): 1}


@pytest.mark.parametrize(("content", "words"), [
    (b"a = 1\nb = \n", "x.toml:2: this is not TOML: "),
    (b"a = 1\na = 2\n", "x.toml:2: this is not TOML: "),
    (b"a = 1\n\nb = '''\nx\n\n", "x.toml:4: this is not TOML: "),
    (b"a = [1,\n2\n", "x.toml:2: this is not TOML: "),
    (b"a = 1\rb = 2\n", "x.toml:1: this is not TOML: "),
    (b"a = 1\nb = '\xff'\n", "x.toml:2: not UTF-8"),
])  # fmt: skip
def test_what_is_no_toml_is_named_with_its_line(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "x.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_toml(path)
    assert str(caught.value).startswith(f"{tmp_path}/{words}")


def test_missing_files_and_folders_are_no_job_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no file"):
        read_toml(tmp_path / "x.toml")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_toml(tmp_path)


def test_on_python_3_10_tomli_takes_the_place_of_tomllib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(toml_lines, "sys", SimpleNamespace(version_info=(3, 10)))
    pytest.importorskip("tomli")
    assert write(tmp_path / "x.toml", "[a]\nb = 1") == {("a",): 1, ("a", "b"): 2}
    monkeypatch.setitem(sys.modules, "tomli", None)
    with pytest.raises(MissingDependencyError, match=r"simskip-vdb\[nightly\]"):
        write(tmp_path / "x.toml", "a = 1")
