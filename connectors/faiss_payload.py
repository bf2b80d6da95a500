"""What frameworks keep of the rows of a FAISS file, in files beside it."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from simskip_vdb.datatypes import Ids
from simskip_vdb.durable import disk_errors, json_of
from simskip_vdb.errors import ConfigError, StoreError, listed

Fields = Mapping[str, Any]
_SOURCE = "1"  # LlamaIndex's word for the document that a node was cut from
_SQLITE = b"SQLite format 3\0"


class Payload(NamedTuple):
    """Where the payload of rows is.

    Attributes:
        file: What names the rows.
        ids: The field that names them.
        rows: Reads (index id, fields) of every row.
    """

    file: Path
    ids: str
    rows: Callable[[Path], Iterable[tuple[int, Fields]]]

    def read(self, fields: Sequence[str]) -> dict[int, list[Any]]:
        """Return the values of some fields by index id.

        Raises:
            StoreError: The file is damaged.
            ConfigError: No row has one of the fields.
        """
        known: set[str] = set()
        found = {}
        try:
            with disk_errors(self.file):
                for row, values in self.rows(self.file):
                    known.update(values)
                    found[int(row)] = [values.get(name) for name in fields]
        except (
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            IndexError,
            sqlite3.Error,
        ) as error:
            raise StoreError(
                f"{self.file} does not tell what the rows of the index beside it are "
                f"({type(error).__name__}: {error}); give your ids of the rows with --doc-ids FILE"
            ) from error
        for name in fields:
            if name not in known:
                raise ConfigError(
                    f"{self.file}: no row has a field '{name}'; there are: "
                    f"{listed(sorted(known))}. Name one of them, or a file of ids (--doc-ids FILE)"
                )
        return found


def payload_beside(index: Path) -> Payload | None:
    """Return where the payload of an index is; None where a file stands alone."""
    folder = index.parent
    if index.name.endswith("__vector_store.json"):
        for file, rows in (("id_map.json", _mapped_nodes), ("index_store.json", _listed_nodes)):
            if (folder / file).is_file():
                return Payload(folder / file, "node_id", rows)
    if index.name == "faiss.index" and (folder / "docstore.json").is_file():
        return Payload(folder / "docstore.json", "id", _langchain_js)
    if index.name == "embeddings" and _is_sqlite(folder / "documents"):
        return Payload(folder / "documents", "id", _txtai)
    return None


def columns(found: Mapping[int, Sequence[Any]], ids: Ids, fields: Sequence[str]) -> dict[str, Any]:
    """Return the values of some rows by field, None where a row has none."""
    nothing = [None] * len(fields)
    rows = [found.get(row, nothing) for row in ids.tolist()]
    return {name: [row[at] for row in rows] for at, name in enumerate(fields)}


def _mapped_nodes(file: Path) -> Iterator[tuple[int, Fields]]:
    """LlamaIndex, where rows have ids of their own."""
    yield from _nodes(file.parent, json_of(file.read_bytes())["faiss_id_to_node_id_map"])


def _listed_nodes(file: Path) -> Iterator[tuple[int, Fields]]:
    """LlamaIndex, where a row is known by its position."""
    for index in json_of(file.read_bytes())["index_store/data"].values():
        if index["__type__"] == "vector_store":
            told = index["__data__"]
            names = (json_of(told) if isinstance(told, str) else told)["nodes_dict"]
            if all(name.isdigit() for name in names):
                yield from _nodes(file.parent, names)


def _nodes(folder: Path, names: Mapping[str, str]) -> Iterator[tuple[int, Fields]]:
    store, told = folder / "docstore.json", {}
    if store.is_file():
        told = json_of(store.read_bytes()).get("docstore/data", {})
    for row, name in names.items():
        node = told.get(name, {}).get("__data__", {})
        fields = _node(json_of(node) if isinstance(node, str) else node)
        yield int(row), {**fields, "node_id": name}


def _node(node: Mapping[str, Any]) -> dict[str, Any]:
    source = node.get("relationships", {}).get(_SOURCE) or {}
    known = {"text": node.get("text"), "ref_doc_id": source.get("node_id")}
    given = {name: value for name, value in known.items() if value is not None}
    return {**node.get("metadata", {}), **given}


def _langchain_js(file: Path) -> Iterator[tuple[int, Fields]]:
    told = json_of(file.read_bytes())
    mapped = len(told) == 2 and isinstance(told[1], dict)  # else an id is a position
    known = dict(told[0] if mapped else told)
    names = told[1] if mapped else {name: name for name in known}
    for row, name in names.items():
        document = known.get(name, {})
        text = {"pageContent": document["pageContent"]} if "pageContent" in document else {}
        yield int(row), {**document.get("metadata", {}), **text, "id": name}


def _txtai(file: Path) -> Iterator[tuple[int, Fields]]:
    address = f"file:{file.as_posix().replace('?', '%3f').replace('#', '%23')}?mode=ro"
    data = sqlite3.connect(address, uri=True)
    try:
        wanted = "SELECT s.indexid, s.id, s.text, s.tags, d.data FROM sections s"
        for row, name, text, tags, more in data.execute(
            f"{wanted} LEFT JOIN documents d ON d.id = s.id"
        ):
            given = json_of(more) if isinstance(more, str) else {}
            own = {"text": text, "tags": tags}
            told = {key: value for key, value in own.items() if value is not None}
            yield row, {**(given if isinstance(given, dict) else {}), **told, "id": name}
    finally:
        data.close()


def _is_sqlite(file: Path) -> bool:
    if not file.is_file():
        return False
    with disk_errors(file), file.open("rb") as data:
        return data.read(len(_SQLITE)) == _SQLITE
