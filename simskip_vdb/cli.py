"""The command line: parse, call one function, print, map errors to exit codes."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

import click

from simskip_vdb import __version__, logs
from simskip_vdb import options as shared
from simskip_vdb.bars import Bars
from simskip_vdb.errors import ConfigError, SimskipError
from simskip_vdb.judgments import RULES
from simskip_vdb.pace import Pace, stops_on_sigterm
from simskip_vdb.threads import wait_asleep

INTERRUPTED = 130

EXIT_CODES = """\b
Exit codes:
  0    done
  1    failed; the message says what and what to do
  2    wrong usage; nothing was touched
  3    the gate refused; nothing was written
  4    stopped part-way; the same command resumes
  5    the gate let it pass, but no row was written; the index is as it was
  6    nightly: fresh queries proved that what is live does harm
  130  interrupted; the same command resumes"""

SPLITS = """One set of judgments is split by a hash of the query id, about 60/20/20, into fit,
validation and test; a query never changes its split. Fewer than 150 queries are cross-fitted by
refine instead: each is scored by one of five refiners that never saw it. Rows of the index that
are NaN, infinite or zero are left as they are; nothing is learnt from those, nor from absurdly
long or short ones (norms beyond 1e-15 to 1e15)."""


PLAIN = str.maketrans(
    {"·": "-", "×": "x", "–": "-", "→": "->", "…": "...", "α": "alpha", "β": "beta", "±": "+-"}
)
"""What our own signs become where a stream is not Unicode; its readers may take it for anything."""


def _paragraphs(text: str) -> list[str]:
    """Return sentences that begin a line as paragraphs of their own."""
    return re.split(r"(?<=\.)\n", text)


class _Command(click.Command):
    r"""A command whose docstring is raw, for the backslashes in its examples: ``\b`` is a mark."""

    def __init__(self, *arguments: Any, **named: Any) -> None:  # noqa: ANN401 click's
        super().__init__(*arguments, **named)
        self.help = self.help and self.help.replace("\\b\n", "\b\n")


class _Group(click.Group):
    command_class = _Command


@click.group(
    cls=_Group,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=EXIT_CODES,
)
@click.version_option(__version__, prog_name="simskip")
@click.option("-v", "--verbose", is_flag=True, help="Log each stage to stderr.")
def cli(verbose: bool) -> None:
    """Make a vector index better without re-embedding it.

    Reads the vectors that an index holds, fits a small refiner on them, proves on held-out queries
    whether retrieval got better, and only then writes refined vectors back: same ids, order,
    parameters. One command undoes it. Try `simskip demo`.

    INDEX is a URI: faiss:PATH, or a plain path to a FAISS file ('faiss:FOLDER/part*.faiss' for
    several that are one index); parquet:PATH, a file or a folder; npy:FILE, npz:FILE?key=K and
    safetensors:FILE?key=K, or a plain path that ends so; qdrant://HOST:PORT/COLLECTION and
    qdrant+https://…; qdrant-edge:PATH; qdrant-local:PATH?collection=NAME; each with ?vector=NAME
    where vectors have names.
    """
    wait_asleep()
    logs.configure(logging.INFO if verbose else logging.WARNING)


def main() -> None:
    """Run the command line and exit with the code that the outcome means."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # such as α where the terminal is Latin-1
    try:
        code = cli.main(prog_name="simskip", standalone_mode=False) or 0
    except click.ClickException as error:
        error.show()
        code = _fail(error.format_message(), "UsageError", error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        message = "interrupted; the same command resumes"
        _tell(message, err=True)
        code = _fail(message, "Interrupted", INTERRUPTED)
    except SimskipError as error:
        _tell(f"error: {error}", err=True)
        code = _fail(str(error), type(error).__name__, error.exit_code)
    except OSError as error:
        logging.getLogger(__name__).info("it happened here:", exc_info=True)
        message = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        _tell(f"error: {message}; what a run had begun, the same command takes up", err=True)
        code = _fail(message, type(error).__name__, SimskipError.exit_code)
    except Exception as error:  # a defect: the traceback is for its report
        traceback.print_exc()
        code = _fail(str(error), type(error).__name__, SimskipError.exit_code)
    sys.exit(code)


def _fail(message: str, kind: str, code: int) -> int:
    if "--json" in sys.argv:
        _print_json({"schema": 1, "error": {"type": kind, "message": message}, "exit_code": code})
    return code


@cli.command(short_help="Watch an index get better and get restored, on real data.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("demo"),
    show_default=True,
    help="Folder for the index, the judgments and the picture.",
)
@shared.seed
@shared.json
def demo(out: Path, seed: int, as_json: bool) -> None:
    """Watch an index get better and get restored, on real data.

    Builds an IVF index of handwritten digits, refines it in place, prints before and after, draws
    queries with their neighbours, rolls back, and compares checksums. Takes under a minute.
    """
    from simskip_vdb.demo import run_demo

    with Bars() as bars:
        result = run_demo(out, seed=seed, progress=bars, say=_say(as_json))
    if as_json:
        _print_json(result)


@cli.command(short_help="Show what an index is, its health, and what to do next.")
@shared.index
@shared.state
@shared.json
def inspect(index: str, filter: str | None, state: Path | None, as_json: bool) -> None:  # noqa: A002
    """Show what an index is, how healthy its vectors are, and what could be done next."""
    from simskip_vdb.connectors import open_store
    from simskip_vdb.inspection import inspect as look
    from simskip_vdb.inspection import render

    with Bars() as bars:
        result = look(open_store(index, read_only=True, filter=filter), state, progress=bars)
    _print(result, render, as_json)


@cli.command(epilog=EXIT_CODES, short_help="Fit a refiner and show validation; write nothing.")
@shared.index
@shared.judgments
@shared.originals
@shared.measure
@shared.fitting
@shared.state
@shared.json
def fit(index: str, as_json: bool, **options: Any) -> None:  # noqa: ANN401 click's options
    """Fit a refiner and show what validation says of it; write nothing to INDEX.

    The test queries are not read. Use the refiner with `simskip refine INDEX --refiner DIR`.
    """
    from simskip_vdb import pipeline
    from simskip_vdb.report import render

    store, judgments, settings = _prepare(index, options)
    with Bars() as bars:
        report = pipeline.fit(store, judgments, settings, progress=bars)
    _print(report.to_dict(), render, as_json)


@cli.command(epilog=EXIT_CODES, short_help="Measure before and after a refiner; write nothing.")
@shared.index
@shared.judgments
@shared.originals
@shared.measure
@click.option(
    "--refiner",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="The refiner to compare with what INDEX holds; by default the one that wrote it.",
)
@click.option(
    "--on",
    type=click.Choice(["validation", "test"]),
    default="validation",
    show_default=True,
    help="Which queries. test is recorded as a look, and each look makes the gate stricter.",
)
@shared.search_params
@shared.seed
@shared.state
@shared.json
def evaluate(index: str, as_json: bool, **options: Any) -> None:  # noqa: ANN401 click's options
    """Measure retrieval before and after a refiner; write nothing to INDEX."""
    from simskip_vdb import pipeline
    from simskip_vdb.datatypes import Split
    from simskip_vdb.report import render

    on = Split(options.pop("on"))
    store, judgments, settings = _prepare(index, options)
    with Bars() as bars:
        report = pipeline.evaluate(store, judgments, settings, on=on, progress=bars)
    _print(report.to_dict(), render, as_json)


@cli.command(
    epilog=EXIT_CODES,
    short_help="Tell what gain the test queries could prove.",
)
@shared.index
@shared.judgments
@shared.originals
@shared.measure
@shared.seed
@shared.state
@shared.json
def power(index: str, as_json: bool, **options: Any) -> None:  # noqa: ANN401 click's options
    """Tell, before any fit, what gain the test queries could prove, and how many would do.

    No test query is looked at, and nothing is written.
    """
    from simskip_vdb import provable

    store, judgments, settings = _prepare(index, options, read_only=True)
    with Bars() as bars:
        result = provable.power(store, judgments, settings, progress=bars)
    _print(result, provable.render_power, as_json)


@cli.command(
    epilog="\n\n".join([*_paragraphs(RULES), SPLITS, EXIT_CODES]),
    short_help="Refine an index, if held-out queries prove a gain.",
)
@shared.index
@shared.judgments
@shared.originals
@shared.measure
@shared.growing
@shared.fitting
@click.option(
    "--refiner",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Use this fitted refiner instead of fitting one.",
)
@shared.search_params
@shared.mode
@shared.executor
@shared.guard_field
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="With --side both: the new file; INDEX stays as it is.",
)
@click.option(
    "--accept-unmeasured",
    is_flag=True,
    help="Write although nothing can be measured. Never overrides a measured refusal.",
)
@click.option(
    "--dry-run", is_flag=True, help="Show what would happen; write nothing, read no test query."
)
@shared.state
@shared.json
def refine(index: str, as_json: bool, **options: Any) -> int:  # noqa: ANN401 click's options
    r"""Refine INDEX in place, if held-out queries prove that retrieval gets better.

    \b
    simskip refine faiss:products.faiss --queries q.npy --query-ids q.txt \
        --qrels qrels.tsv --doc-ids ids.txt
    simskip refine faiss:scifact.faiss --qrels beir/scifact
    simskip refine faiss:shop.faiss --queries q.npy --query-ids q.txt \
        --clicks ubi --doc-ids ids.txt
    simskip refine faiss:intents.faiss --labels labels.txt \
        --test-queries q.npy --test-labels ql.txt --side both \
        --output better.faiss
    simskip refine "qdrant://localhost:6333/products?vector=text" \
        --queries q.parquet --qrels qrels.tsv --doc-id-field sku
    simskip refine qdrant-edge:shard --group-field category
    simskip refine faiss:shared.faiss --queries q.npy --query-ids q.txt \
        --qrels qrels.tsv --doc-ids ids.txt --side queries --out refiner
    simskip refine faiss:big.faiss --refiner DIR --accept-unmeasured
    RAY_ADDRESS=head:6379 simskip refine parquet:/shared/rows \
        --executor ray --refiner DIR --queries q.npy --query-ids q.txt \
        --qrels qrels.tsv
    """
    from simskip_vdb import pipeline
    from simskip_vdb.report import render
    from simskip_vdb.upkeep import leave_page

    read_only = options["dry_run"] or options["side"] == "queries"
    store, judgments, settings = _prepare(index, options, read_only=read_only)
    with stops_on_sigterm() as stop, Bars() as bars:
        report = pipeline.refine(store, judgments, settings, progress=Pace(bars, stop=stop))
        if not settings.dry_run:
            leave_page(store, settings.state)
    _print(report.to_dict(), render, as_json)
    return report.exit_code


@cli.command(short_help="Restore the vectors from before the refinement.")
@shared.index
@shared.originals
@shared.guard_field
@shared.state
@shared.json
def rollback(
    index: str,
    filter: str | None,  # noqa: A002 Qdrant's name for it
    originals: str | None,
    originals_ids: Path | None,
    guard_field: str | None,
    state: Path | None,
    as_json: bool,
) -> None:
    """Restore the vectors that INDEX held before it was refined.

    Where the file is as `refine` left it, the very bytes from before come back. Otherwise refined
    rows get their original vectors again, and rows that were added or changed since stay.
    """
    from simskip_vdb import upkeep
    from simskip_vdb.connectors import open_store
    from simskip_vdb.report import render_rollback

    with stops_on_sigterm() as stop, Bars() as bars:
        store = open_store(
            index,
            filter=filter,
            guard_field=guard_field,
            originals=originals,
            originals_ids=originals_ids,
        )
        result = upkeep.rollback(store, state=state, progress=Pace(bars, stop=stop))
        upkeep.leave_page(store, state)
    _print(result, render_rollback, as_json)


@cli.command(short_help="Tell whether an index is refined, and how to undo it.")
@shared.index
@shared.state
@shared.json
def status(index: str, filter: str | None, state: Path | None, as_json: bool) -> None:  # noqa: A002
    """Tell whether INDEX is refined, by what, since when, with what gain, and how to undo it."""
    from simskip_vdb import upkeep
    from simskip_vdb.connectors import open_store
    from simskip_vdb.report import render_status

    store = open_store(index, read_only=True, filter=filter)
    _print(upkeep.status(store, state=state), render_status, as_json)


@cli.command(short_help="Remove what is needed neither to go on nor to undo.")
@shared.index
@click.option(
    "--final",
    is_flag=True,
    help="Also remove the file from before; rollback then restores rows, not the very file.",
)
@click.option(
    "--runs", type=click.IntRange(1), help="Keep the records of so many runs, the last ones."
)
@click.option(
    "--refiners",
    type=click.IntRange(0),
    help="Keep so many of the refiners that wrote INDEX before the current one.",
)
@shared.state
@shared.json
def prune(
    index: str,
    filter: str | None,  # noqa: A002 Qdrant's name for it
    final: bool,
    runs: int | None,
    refiners: int | None,
    state: Path | None,
    as_json: bool,
) -> None:
    """Remove refiners and files that INDEX needs neither to go on nor to undo."""
    from simskip_vdb import upkeep
    from simskip_vdb.connectors import open_store
    from simskip_vdb.report import render_prune

    store = open_store(index, read_only=True, filter=filter)
    done = upkeep.prune(store, state=state, final=final, runs=runs, refiners=refiners)
    _print(done, render_prune, as_json)


@cli.command(short_help="Write the page about the last run and the history.")
@shared.index
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The page; by default report.html in the state folder.",
)
@click.option("--markdown", is_flag=True, help="Print a short summary instead, for a chat.")
@shared.state
def report(
    index: str,
    filter: str | None,  # noqa: A002 Qdrant's name for it
    out: Path | None,
    markdown: bool,
    state: Path | None,
) -> None:
    """Write the page about INDEX's last run, with the history of all, and print where it is.

    Each refine, rollback and night leaves this page in the state folder; this makes it again.
    """
    from simskip_vdb import upkeep
    from simskip_vdb.connectors import open_store
    from simskip_vdb.durable import write_durably
    from simskip_vdb.state_place import state_folder

    store = open_store(index, read_only=True, filter=filter)
    text = upkeep.report(store, state=state, markdown=markdown)
    if markdown:
        _tell(text)
        return
    path = out or state_folder(store, state) / upkeep.PAGE
    write_durably(path, text.encode())
    _tell(str(path))


@cli.command(epilog=EXIT_CODES, short_help="Look after many indexes, as a job file describes them.")
@click.argument("jobs", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--check", is_flag=True, help="Only check the job file, all of it.")
@click.option("--only", metavar="NAME", multiple=True, help="Run this job; may be repeated.")
@click.option(
    "--dry-run",
    is_flag=True,
    help="Show what each job would do, how long it would take and what it would cost; write "
    "nothing, read no test query.",
)
@click.option(
    "--log-format",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="How log lines look on stderr.",
)
@shared.json
def nightly(
    jobs: Path, check: bool, only: tuple[str, ...], dry_run: bool, log_format: str, as_json: bool
) -> int:
    r"""Look after many indexes, as the file JOBS describes them.

    Each job refines what is new, fits again when rows or queries have drifted, judgments came or
    the last fit is old, and lets a new refiner take over only if it beats the current one on
    held-out queries. docs/nightly.md describes the file, and has recipes for cron and others.

    \b
    simskip nightly jobs.toml --check
    simskip nightly jobs.toml --log-format json
    """
    from simskip_vdb.jobs import read_jobs
    from simskip_vdb.nightly import render_nightly, run_nightly

    if log_format == "json":
        logs.configure(logging.getLogger().level, "json")
    found = read_jobs(jobs, only)
    if check:
        names = [job.name for job in found.jobs]
        result: Mapping[str, Any] = {"schema": 1, "jobs": names, "problems": 0}
        _print(result, lambda _: f"{jobs}: {len(names)} jobs, no problems", as_json)
        return 0
    with stops_on_sigterm() as stop, Bars() as bars:
        result = run_nightly(found, dry_run=dry_run, stop=stop, progress=bars)
    _print(result, render_nightly, as_json)
    return int(result["exit_code"])


def _prepare(
    index: str, options: dict[str, Any], *, read_only: bool = False
) -> tuple[Any, Any, Any]:
    """Read everything that the options name, before anything else happens."""
    from simskip_vdb.clicks import gather
    from simskip_vdb.config import FitSettings, Signal
    from simskip_vdb.connectors import open_store
    from simskip_vdb.datatypes import Side
    from simskip_vdb.judgments import JudgmentFiles
    from simskip_vdb.pipeline import Settings

    names = [name.replace("-", "_") for name, _ in shared.JUDGMENT_FILES]
    files = JudgmentFiles(**{name: options.pop(name) for name in names})
    fitting = FitSettings(
        side=Side(options.pop("side", "docs")),
        signal=Signal(options.pop("signal", "auto")),
        seed=options.pop("seed"),
        device=options.pop("device", "auto"),
    )
    params = _parameters(options.pop("search_params", ""))
    fields = {name: options.pop(name) for name in ("doc_id_field", "group_field")}
    opening = ("originals", "originals_ids", "filter", "guard_field")
    store = {name: options.pop(name, None) for name in opening}
    judgments = gather(files, options.pop("clicks"), **fields)
    settings = Settings(fit=fitting, search_params=params, **options)
    return open_store(index, read_only=read_only, **store), judgments, settings


def _parameters(text: str) -> Mapping[str, float]:
    params: dict[str, float] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, value = part.partition("=")
        try:
            params[name.strip()] = int(value) if value.strip().isdigit() else float(value)
        except ValueError:
            raise ConfigError(
                f"--search-params: '{part}' is not NAME=NUMBER; write for example nprobe=16"
            ) from None
    return params


def _print(
    result: Mapping[str, Any], render: Callable[[Mapping[str, Any]], str], as_json: bool
) -> None:
    if as_json:
        _print_json(result)
    else:
        _tell(render(result))


def _print_json(result: Mapping[str, Any]) -> None:
    ascii_only = not _is_unicode(sys.stdout)
    _tell(json.dumps(result, indent=2, ensure_ascii=ascii_only, allow_nan=False))


def _say(as_json: bool) -> Callable[[str], None]:
    return lambda text: _tell(text, err=as_json)


def _tell(text: str, *, err: bool = False) -> None:
    """Print; that nobody reads it any more changes nothing of what was done."""
    stream = sys.stderr if err else sys.stdout
    if not _is_unicode(stream):
        text = text.translate(PLAIN)
    try:
        click.echo(text, err=err)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _is_unicode(stream: TextIO) -> bool:
    return (stream.encoding or "utf-8").lower().startswith("utf")
