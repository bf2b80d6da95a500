"""What people give as evidence of relevance: read it and check it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from simskip_vdb.datatypes import Ids, Vectors, id_names
from simskip_vdb.errors import ConfigError, DataError
from simskip_vdb.parsing import (
    Qrels,
    RowColumn,
    read_lines,
    read_query_table,
    read_row_column,
    read_vectors,
)
from simskip_vdb.qrels_forms import read_any_qrels, read_ids

RULES = """\
Refused: repeated query ids; vectors of another dimension than the index; ids, labels and vectors
of different counts; malformed lines; grades that are not integers; one pair judged with different
grades; a query in two splits; judgments of which nothing is usable; fewer than two rows.
Skipped and counted: queries with NaN, infinite or zero vectors; judgments of unknown documents or
queries; queries without a relevant known document; queries to be split that are near-identical to
one given for validation or test; repeated equal judgments.
Grade 0 means judged not relevant; negative grades count as 0."""
"""What is refused and what is skipped, for help texts."""


_VECTORS = ("queries.npy", "queries.parquet")


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgmentFiles:
    """The files that hold judgments, by the names of their options; all may be left out.

    In place of a file, `qrels` may be a folder of BEIR, which holds the ids of the rest, each file
    of judgments may be a name of ir_datasets, as ``ir_datasets:NAME``, and `doc_ids` may be the
    name of the payload field that holds them.
    """

    queries: Path | str | None = None
    query_ids: Path | str | None = None
    qrels: Path | str | None = None
    doc_ids: Path | str | None = None
    labels: Path | str | None = None
    dev_queries: Path | str | None = None
    dev_query_ids: Path | str | None = None
    dev_qrels: Path | str | None = None
    dev_labels: Path | str | None = None
    test_queries: Path | str | None = None
    test_query_ids: Path | str | None = None
    test_qrels: Path | str | None = None
    test_labels: Path | str | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class QuerySet:
    """Queries that were given together, with either judgments or labels.

    Attributes:
        option: The option that named them, such as ``--test-queries``.
        ids: Query ids, length m, all different.
        vectors: Shape (m, d), float32, as they were read.
        qrels: Judgments; None where there are labels, or until others join.
        labels: One label a query, length m; None where there are judgments.
    """

    option: str
    ids: tuple[str, ...]
    vectors: Vectors
    qrels: Qrels | None = None
    labels: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Judgments:
    """Everything that people gave, with external ids, not yet tied to rows.

    Attributes:
        queries: Queries to be split by hash.
        dev: Queries given for validation.
        test: Queries given for test.
        doc_ids: External document id of each row; None where judgments name index ids.
        labels: Label of each row; None without groups.
        doc_id_field: Payload field that holds the document ids; None where `doc_ids` has them.
        group_field: Payload field that holds the labels; None where `labels` has them.
    """

    queries: QuerySet | None = None
    dev: QuerySet | None = None
    test: QuerySet | None = None
    doc_ids: RowColumn | None = None
    labels: RowColumn | None = None
    doc_id_field: str | None = None
    group_field: str | None = None

    @property
    def fields(self) -> tuple[str, ...]:
        """Payload fields that must be read with the rows."""
        return tuple(dict.fromkeys(filter(None, (self.doc_id_field, self.group_field))))

    def naming_rows_by(self, field: str | None) -> Judgments:
        """Take document ids from a payload field, unless they are given or not needed."""
        given = self.doc_ids is not None or self.doc_id_field is not None
        sets = (self.queries, self.dev, self.test)
        judged = any(one is not None and one.qrels is not None for one in sets)
        return self if given or field is None or not judged else replace(self, doc_id_field=field)

    def with_columns(self, columns: Mapping[str, Sequence[Any]], row_ids: Ids) -> Judgments:
        """Return these judgments with what the payload fields held.

        Args:
            columns: Values by field, each of length n; None where a row has none.
            row_ids: Shape (n,).

        Raises:
            DataError: A value is neither text nor a number.
        """
        doc_ids, labels = self.doc_ids, self.labels
        if self.doc_id_field is not None:
            doc_ids = _column(self.doc_id_field, columns[self.doc_id_field], row_ids)
        if self.group_field is not None:
            labels = _column(self.group_field, columns[self.group_field], row_ids)
        return replace(self, doc_ids=doc_ids, labels=labels)


def _column(field: str, values: Sequence[Any], row_ids: Ids) -> RowColumn:
    source = f"payload field '{field}'"
    given = np.array([value is not None for value in values], np.bool_)
    odd = set(map(type, values)) - {str, int, float, bool, type(None)}
    if odd:
        row = next(i for i, value in enumerate(values) if type(value) in odd)
        raise DataError(
            f"{source} of row {id_names(row_ids[row : row + 1])[0]} is {values[row]!r}; it must be "
            "one text or number"
        )
    if not given.any():
        raise DataError(f"{source}: no row has it; name a field that rows have")
    names = [str(value) for value in values if value is not None]
    return RowColumn(source=source, values=names, row_ids=row_ids[given])


def read_judgments(
    files: JudgmentFiles,
    *,
    doc_id_field: str | None = None,
    group_field: str | None = None,
    more: bool = False,
) -> Judgments:
    """Read what the files hold and check it as far as it can be without the index.

    Args:
        files: The files.
        doc_id_field: Payload field that holds each row's document id.
        group_field: Payload field that holds each row's group.
        more: Whether judgments from elsewhere join these, so that queries and document ids may
            come without any.

    Raises:
        ConfigError: A file is missing, or options do not belong together.
        DataError: A file's content breaks one of the `RULES`.
        MissingDependencyError: A parquet file was given and pyarrow is not installed.
    """
    for problem in misfits(files, doc_id_field=doc_id_field, group_field=group_field, more=more):
        raise ConfigError(problem)
    if files.doc_ids is not None and names_field(files.doc_ids):
        files, doc_id_field = replace(files, doc_ids=None), str(files.doc_ids)
    if _is_beir(files):
        return _read_beir(files, doc_id_field)
    doc_ids, labels = _path(files, "doc_ids"), _path(files, "labels")
    return Judgments(
        queries=_read_set(files, ""),
        dev=_read_set(files, "dev_"),
        test=_read_set(files, "test_"),
        doc_ids=None if doc_ids is None else read_row_column(doc_ids),
        labels=None if labels is None else read_row_column(labels),
        doc_id_field=doc_id_field,
        group_field=group_field,
    )


def names_field(given: Path | str) -> bool:
    """Tell whether what stands for document ids is the name of a field: a bare word, no file."""
    return re.fullmatch(r"[^./\\]+", str(given)) is not None and not Path(given).exists()


def misfits(
    files: JudgmentFiles, *, doc_id_field: str | None, group_field: str | None, more: bool
) -> Iterator[str]:
    """Yield a message for each way in which options do not belong together; no file is opened.

    Args:
        files: See `read_judgments`, as for the rest.
        doc_id_field: Field of document ids.
        group_field: Field of groups.
        more: Whether judgments from elsewhere join these.
    """
    if _is_beir(files):
        yield from _misfits_of_beir(files, group_field)
        return
    grouped = files.labels is not None or group_field is not None
    for prefix in ("", "dev_", "test_"):
        yield from _misfits_of_set(files, prefix, grouped, more)
    if files.queries is not None and files.qrels is None and not more:
        yield "--queries needs --qrels, the judgments of those queries"
    judged = more or any((files.qrels, files.dev_qrels, files.test_qrels))
    for name, given in (("doc_ids", files.doc_ids), ("doc_id_field", doc_id_field)):
        if given is not None and not judged:
            yield f"{_option(name)} has no effect without judgments; give --qrels or leave it out"
    if files.doc_ids is not None and doc_id_field is not None:
        yield "--doc-ids and --doc-id-field say the same; give one of them"
    if files.labels is not None and group_field is not None:
        yield "--labels and --group-field say the same; give one of them"


def _is_beir(files: JudgmentFiles) -> bool:
    return files.qrels is not None and Path(files.qrels).is_dir()


def _misfits_of_beir(files: JudgmentFiles, group_field: str | None) -> Iterator[str]:
    used = ("queries", "query_ids", "qrels", "doc_ids")
    names = (field.name for field in fields(JudgmentFiles) if field.name not in used)
    others = [_option(name) for name in names if getattr(files, name) is not None]
    others += [] if group_field is None else ["--group-field"]
    if others:
        yield f"--qrels {files.qrels} is a folder, which holds all judgments; leave out {others[0]}"


def _misfits_of_set(files: JudgmentFiles, prefix: str, grouped: bool, more: bool) -> Iterator[str]:
    path, ids = _path(files, f"{prefix}queries"), _path(files, f"{prefix}query_ids")
    qrels = _path(files, f"{prefix}qrels")
    labels = _path(files, f"{prefix}labels") if prefix else None
    queries = _option(f"{prefix}queries")
    if path is None:
        for name, given in (("query_ids", ids), ("qrels", qrels), ("labels", labels)):
            if given is not None:
                yield f"{_option(prefix + name)} needs {queries}, the vectors"
        return
    if path.suffix not in (".npy", ".parquet", ".jsonl"):
        yield f"{queries} {path}: give a .npy, .parquet or .jsonl file"
    elif ids is not None and path.suffix != ".npy":
        yield f"{path} holds its ids; leave {_option(prefix + 'query_ids')} out"
    named = qrels is not None or (more and not prefix)
    if named and ids is None and path.suffix == ".npy":
        yield (
            f"{queries} {path} holds no ids for the judgments to name; "
            f"give {_option(prefix + 'query_ids')}, one id a line"
        )
    if prefix and (qrels is None) == (labels is None):
        yield f"{queries} needs either {_option(prefix + 'qrels')} or {_option(prefix + 'labels')}"
    if labels is not None and not grouped:
        yield (
            f"{_option(prefix + 'labels')} needs --labels or --group-field, the labels of the rows"
        )


def _read_set(files: JudgmentFiles, prefix: str) -> QuerySet | None:
    path = _path(files, f"{prefix}queries")
    if path is None:
        return None
    qrels = _path(files, f"{prefix}qrels")
    labels = _path(files, f"{prefix}labels") if prefix else None
    ids, vectors = read_query_vectors(path, _path(files, f"{prefix}query_ids"), prefix)
    texts = None if labels is None else tuple(read_lines(labels))
    if texts is not None and len(texts) != len(ids):
        raise DataError(f"{labels} has {len(texts)} labels for {len(ids)} queries in {path}")
    return QuerySet(
        option=_option(f"{prefix}queries"),
        ids=tuple(ids),
        vectors=vectors,
        qrels=None if qrels is None else read_any_qrels(qrels),
        labels=texts,
    )


def read_query_vectors(
    path: Path, ids_path: Path | None, prefix: str
) -> tuple[Sequence[str], Vectors]:
    """Return ids and vectors of queries, shape (m, d).

    Args:
        path: A ``.npy``, ``.parquet`` or ``.jsonl`` file.
        ids_path: Ids of a ``.npy``'s rows: one a line, MS MARCO's ``id<TAB>text``, or BEIR's
            ``.jsonl``; None to count.
        prefix: ``dev_``, ``test_`` or empty, for ids that are counted.

    Raises:
        DataError: A file is malformed, counts differ, or an id repeats.
    """
    if path.suffix != ".npy":
        ids, vectors = read_query_table(path)
    else:
        vectors = read_vectors(path)
        if ids_path is None:
            # Both sets may leave ids out, and a query's split goes by its id.
            return [f"{prefix.rstrip('_')}:{i}" for i in range(len(vectors))], vectors
        ids = _read_ids(ids_path)
        if len(ids) != len(vectors):
            raise DataError(f"{ids_path} has {len(ids)} ids for {len(vectors)} vectors in {path}")
    repeated = [name for name, times in Counter(ids).items() if times > 1]
    if repeated:
        raise DataError(
            f"{ids_path or path}: query id {repeated[0]!r} occurs more than once "
            f"({len(repeated)} such ids); give every query its own"
        )
    return ids, vectors


def _read_ids(path: Path) -> list[str]:
    if path.suffix == ".jsonl":
        return read_ids(path)
    lines = read_lines(path)
    if lines and all("\t" in line for line in lines):
        return [line.partition("\t")[0].rstrip() for line in lines]
    return lines


def _read_beir(files: JudgmentFiles, doc_id_field: str | None) -> Judgments:
    """Read judgments from a folder of BEIR that is named in place of a file of them.

    ``qrels/test.tsv`` is for the test, ``qrels/dev.tsv`` for validation, ``qrels/train.tsv`` is
    shared out to the rest; without train, dev is; a single file is shared out to all three. The
    folder holds texts, so the queries' vectors come from `JudgmentFiles.queries`, or from
    ``queries.npy`` or ``queries.parquet`` in it: a ``.npy`` in the order of ``queries.jsonl``
    unless ids are given. Documents are named in the order of ``corpus.jsonl`` unless they are
    given.

    Raises:
        ConfigError: Something of that is missing.
        DataError: A file is malformed.
    """
    folder = Path(files.qrels or "")
    given = {name: folder / "qrels" / f"{name}.tsv" for name in ("train", "dev", "test")}
    given = {name: path for name, path in given.items() if path.is_file()}
    if not given:
        raise ConfigError(
            f"{folder}: there is no qrels/test.tsv, dev.tsv or train.tsv in this folder; name a "
            "file of judgments, or a folder of BEIR"
        )
    ids, vectors = _beir_queries(folder, files)
    shared = next(name for name in ("train", "dev", "test") if name in given)
    sets = {}
    for name, path in given.items():
        qrels = read_any_qrels(path)
        named = set(qrels.query_ids)
        kept = np.array([i for i, query in enumerate(ids) if query in named], np.int64)
        sets[name] = QuerySet(
            option=str(path),
            ids=tuple(ids[i] for i in kept.tolist()),
            vectors=vectors[kept],
            qrels=qrels,
        )
    corpus, doc_ids = folder / "corpus.jsonl", None
    if files.doc_ids is not None:
        doc_ids = read_row_column(Path(files.doc_ids))
    elif doc_id_field is None and corpus.is_file():
        doc_ids = RowColumn(source=str(corpus), values=read_ids(corpus))
    return Judgments(
        queries=sets[shared],
        dev=None if shared == "dev" else sets.get("dev"),
        test=None if shared == "test" else sets.get("test"),
        doc_ids=doc_ids,
        doc_id_field=doc_id_field,
    )


def _beir_queries(folder: Path, files: JudgmentFiles) -> tuple[Sequence[str], Vectors]:
    beside = [folder / name for name in _VECTORS if (folder / name).is_file()]
    path = Path(files.queries) if files.queries is not None else next(iter(beside), None)
    if path is None:
        raise ConfigError(
            f"{folder} holds texts of queries and no vectors; give --queries Q.npy, one vector for "
            "each line of queries.jsonl, or put it into the folder as queries.npy"
        )
    ids = None if files.query_ids is None else Path(files.query_ids)
    if ids is None and path.suffix == ".npy":
        ids = folder / "queries.jsonl"
        if not ids.is_file():
            raise ConfigError(f"{folder} has no queries.jsonl; give --query-ids, one id a line")
    found = read_query_vectors(path, ids, "")
    if not len(found[0]):
        raise DataError(f"{path} has no queries")
    return found


def _path(files: JudgmentFiles, name: str) -> Path | None:
    given: Path | str | None = getattr(files, name)
    return None if given is None else Path(given)


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
