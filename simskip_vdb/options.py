"""Options that mean the same in every command."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from simskip_vdb.judgments import names_field
from simskip_vdb.qrels_forms import IR_DATASETS


class _File(click.Path):
    """A file that exists, a folder or data set of judgments, or a field that holds document ids."""

    def __init__(self, option: str) -> None:
        judgments = option.endswith("qrels")
        super().__init__(exists=True, dir_okay=judgments, path_type=Path)
        self._judgments, self._ids = judgments, option == "doc-ids"

    def convert(self, value: Any, *context: Any) -> Any:  # noqa: ANN401 click's
        """Let names of data sets and of fields pass."""
        named = self._judgments and str(value).startswith(IR_DATASETS)
        named |= self._ids and names_field(value)
        return Path(value) if named else super().convert(value, *context)


F = TypeVar("F", bound=Callable[..., Any])

JUDGMENT_FILES: tuple[tuple[str, str], ...] = (
    ("queries", "Query vectors: .npy, or .parquet/.jsonl with columns id, vector."),
    ("query-ids", "Ids of a .npy's rows, one a line."),
    (
        "qrels",
        "Judgments: TREC or BEIR TSV, plain or .gz; .json, .jsonl, .parquet; a folder of BEIR; or "
        "ir_datasets:NAME.",
    ),
    (
        "doc-ids",
        "Your ids of the rows: one a line where index ids are 0…n-1; else TSV id, your id; or the "
        "payload field that holds them.",
    ),
    ("labels", "Group of each row: one a line where index ids are 0…n-1; else TSV id, group."),
    ("dev-queries", "Queries for validation; otherwise split off by hash."),
    ("dev-query-ids", "Their ids."),
    ("dev-qrels", "Their judgments."),
    ("dev-labels", "Their groups, one a line."),
    ("test-queries", "Queries for the final test; otherwise split off by hash."),
    ("test-query-ids", "Their ids."),
    ("test-qrels", "Their judgments."),
    ("test-labels", "Their groups, one a line."),
)


def _together(*options: Callable[[F], F]) -> Callable[[F], F]:
    def add(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return add


index = _together(
    click.argument("index"),
    click.option(
        "--filter",
        metavar="FIELD=VALUE|JSON|SQL",
        help="Only these rows of a Qdrant collection, such as one tenant's; SQL for LanceDB.",
    ),
)
json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
state = click.option(
    "--state",
    type=click.Path(path_type=Path),
    help="State folder; by default INDEX.simskip/ beside a file or shard, else in your home.",
)
judgments = _together(
    *(click.option(f"--{name}", type=_File(name), help=text) for name, text in JUDGMENT_FILES),
    click.option(
        "--clicks",
        type=click.Path(exists=True, path_type=Path),
        help="Click logs, a file or a folder: JSON lines, Parquet, CSV, or OpenSearch's UBI.",
    ),
    click.option(
        "--doc-id-field", metavar="FIELD", help="Payload field of a row that holds your id of it."
    ),
    click.option("--group-field", metavar="FIELD", help="Payload field that holds a row's group."),
)
guard_field = click.option(
    "--guard-field",
    metavar="FIELD",
    help="Payload field that your application changes on each write (a version, a time): a row "
    "whose field changed is never overwritten. Without it, rows are read again right before.",
)
mode = click.option(
    "--mode",
    type=click.Choice(["in-place", "new-vector", "new-collection"]),
    default="in-place",
    show_default=True,
    help="Qdrant: overwrite the vectors; or add NAME@simskip beside NAME, to be queried by that "
    "name; or copy the collection and switch its alias. --side both needs one of the last two.",
)
executor = click.option(
    "--executor",
    type=click.Choice(["local", "ray"]),
    default="local",
    show_default=True,
    help="Who reads and writes the rows. ray: a worker for each core of the Ray cluster that the "
    "environment variable RAY_ADDRESS names (else of this machine) takes one partition at a time: "
    "a file of 'FOLDER/part*.faiss' or of a Parquet folder, a slice of a Qdrant server's points. "
    "Every machine must see the files and the state folder. A worker that dies is replaced.",
)
originals = _together(
    click.option(
        "--originals",
        metavar="FILE.npy|INDEX",
        help="Where INDEX holds lossy codes (PQ, RaBitQ, PCA…): the exact vectors, in the order "
        "of its rows, or another index that has them under the same ids.",
    ),
    click.option(
        "--originals-ids",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help="INDEX's id of each vector in FILE.npy, one a line.",
    ),
)
measure = click.option(
    "--measure",
    help="What the gate judges, as ir-measures writes it: nDCG@10, R@100, RR@10, P@5, Rprec…  "
    "[default: nDCG@10; Rprec with groups]",
)
search_params = click.option(
    "--search-params",
    default="",
    metavar="NAME=VALUE,…",
    help="Search settings as your application sets them, such as nprobe=16 or efSearch=64.",
)
seed = click.option(
    "--seed",
    type=click.IntRange(0, 2**32 - 1),
    default=0,
    show_default=True,
    help="Seed of every random draw.",
)
fitting = _together(
    click.option(
        "--side",
        type=click.Choice(["docs", "queries", "both", "auto"]),
        default="docs",
        show_default=True,
        help="docs: only stored rows move. queries: the index stays as it is, and queries pass "
        "through the refiner. both: rows and queries. auto: what validates best of these.",
    ),
    click.option(
        "--signal",
        type=click.Choice(["auto", "judged", "groups", "neighbours", "augment"]),
        default="auto",
        show_default=True,
        help="What to learn from; auto takes judgments, else groups, else neighbours.",
    ),
    seed,
    click.option(
        "--device",
        type=click.Choice(["auto", "cpu", "cuda"]),
        default="auto",
        show_default=True,
        help="Where to fit.",
    ),
    click.option(
        "--out", type=click.Path(path_type=Path), help="Also save the refiner to this folder."
    ),
)
growing = click.option(
    "--growing",
    is_flag=True,
    help="Rows keep arriving: fit what is fair to late rows, and refuse what is not.",
)
