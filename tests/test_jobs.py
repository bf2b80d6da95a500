from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simskip_vdb.config import Signal
from simskip_vdb.datatypes import Side
from simskip_vdb.errors import ConfigError
from simskip_vdb.jobs import Job, Jobs, Refit, Retention, Window, read_jobs
from simskip_vdb.judgments import JudgmentFiles

GOOD = "index = 'p.faiss'\njudgments = 'clicks'\n"


class Desk:
    """A folder with the files that jobs name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        for name in ("q.npy", "q.txt", "qrels.tsv", "ids.txt", "labels.txt", "q.parquet", "o.npy"):
            (path / name).touch()
        (path / "clicks").mkdir()

    def read(self, text: str, only: tuple[str, ...] = ()) -> Jobs:
        (self.path / "jobs.toml").write_text(text, encoding="utf-8")
        return read_jobs(self.path / "jobs.toml", only)

    def job(self, text: str) -> Job:
        (found,) = self.read(text if text.startswith("[") else f"[jobs.one]\n{text}").jobs
        return found

    def problems(self, text: str, only: tuple[str, ...] = ()) -> list[str]:
        """Return what is wrong, without the path and the headline."""
        with pytest.raises(ConfigError) as caught:
            self.read(text, only)
        lines = str(caught.value).splitlines()
        path = str(self.path / "jobs.toml")
        assert all(line.startswith(path) for line in lines)
        found = [line.removeprefix(path).removeprefix(":") for line in lines]
        if len(found) > 1:
            assert found.pop(0) == f" has {len(found)} problems; nothing was touched"
        return found


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def test_every_key_arrives(desk: Desk) -> None:
    found = desk.read("""
metrics = 'simskip.prom'
cost_per_hour = 2

[jobs.products]
index = "qdrant-edge:shards/my shard?vector=text"
queries = "q.npy"
query_ids = "q.txt"
qrels = "qrels.tsv"
judgments = "clicks"
doc_id_field = "sku"
group_field = "category"
filter = "tenant=7"
guard_field = "updated_at"
side = "both"
mode = "new-vector"
signal = "judged"
measure = "NDCG@5"
growing = false
search_params = { hnsw_ef = 128, factor = 1.5 }
seed = 7
device = "cpu"
state = "state/products"
window = "22:00-05:30"
rows_per_second = 500
on_harm = "alert"
refit = { new_judgments = 1, max_age_days = inf, drift = false }
retention.runs = 7
retention.refiners = 0
""")
    base = desk.path
    assert (found.path, found.cost_per_hour) == (base / "jobs.toml", 2)
    assert found.metrics == base / "simskip.prom"
    assert found.jobs == (
        Job(
            name="products",
            line=5,
            index=f"qdrant-edge:{base}/shards/my shard?vector=text",
            files=JudgmentFiles(
                queries=base / "q.npy", query_ids=base / "q.txt", qrels=base / "qrels.tsv"
            ),
            clicks=base / "clicks",
            doc_id_field="sku",
            group_field="category",
            filter="tenant=7",
            guard_field="updated_at",
            side=Side.BOTH,
            mode="new-vector",
            signal=Signal.JUDGED,
            measure="nDCG@5",
            growing=False,
            search_params={"hnsw_ef": 128, "factor": 1.5},
            seed=7,
            device="cpu",
            state=base / "state/products",
            window=Window(start=22 * 60, end=5 * 60 + 30),
            rows_per_second=500,
            on_harm="alert",
            refit=Refit(new_judgments=1, max_age_days=math.inf, drift=False),
            retention=Retention(runs=7, refiners=0),
        ),
    )
    assert isinstance(found.jobs[0].search_params["hnsw_ef"], int)


def test_what_is_left_out_has_its_default(desk: Desk) -> None:
    assert desk.job(GOOD) == Job(
        name="one", line=1, index=f"faiss:{desk.path}/p.faiss", clicks=desk.path / "clicks"
    )
    assert desk.job(GOOD).growing
    assert desk.job(GOOD).refit == Refit(new_judgments=0.1, max_age_days=30.0, drift=True)
    assert desk.job(GOOD).retention == Retention(runs=90, refiners=3)


def test_defaults_hold_where_a_job_says_nothing(desk: Desk) -> None:
    text = """[defaults]
judgments = 'clicks'
seed = 5
refit = { drift = false, max_age_days = 7 }
search_params = { nprobe = 16 }
[jobs.a]
index = 'a.faiss'
[jobs.b]
index = 'b.faiss'
seed = 6
refit.max_age_days = 9
search_params.k_factor = 2
"""
    a, b = desk.read(text).jobs
    assert (a.seed, b.seed) == (5, 6)
    assert a.refit == Refit(drift=False, max_age_days=7)
    assert b.refit == Refit(drift=False, max_age_days=9)
    assert (a.search_params, b.search_params) == ({"nprobe": 16}, {"nprobe": 16, "k_factor": 2})


@pytest.mark.parametrize(("given", "expected"), [
    ("p.faiss", "faiss:{base}/p.faiss"),
    ("faiss:sub/p.faiss", "faiss:{base}/sub/p.faiss"),
    ("faiss:/data/p.faiss", "faiss:/data/p.faiss"),
    ("/data/p.faiss", "faiss:/data/p.faiss"),
    ("faiss:shards/part*.faiss", "faiss:{base}/shards/part*.faiss"),
    ("./odd:name", "faiss:{base}/odd:name"),
    ("faiss:~/p.faiss", "faiss:{home}/p.faiss"),
    ("rows.parquet?id=sku", "parquet:{base}/rows.parquet?id=sku"),
    ("e.npy", "npy:{base}/e.npy"),
    ("npz:~/e.npz?key=a", "npz:{home}/e.npz?key=a"),
    ("e.safetensors?key=a&ids=b", "safetensors:{base}/e.safetensors?key=a&ids=b"),
    ("qdrant-edge:shard?vector=a%2Fb", "qdrant-edge:{base}/shard?vector=a%2Fb"),
    ("qdrant-edge:/data/x", "qdrant-edge:/data/x"),
    ("qdrant-local:db?collection=c", "qdrant-local:{base}/db?collection=c"),
    ("qdrant://localhost:6333/c?vector=v", "qdrant://localhost:6333/c?vector=v"),
    ("qdrant+https://host/c", "qdrant+https://host/c"),
])  # fmt: skip
def test_paths_in_an_index_start_from_the_file(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, given: str, expected: str
) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    index = desk.job(f"judgments = 'clicks'\nindex = '{given}'").index
    assert index == expected.format(base=desk.path, home="/home/somebody")


def test_a_folder_with_marks_of_its_own_is_quoted(tmp_path: Path) -> None:
    (tmp_path / "50% off?").mkdir()
    index = Desk(tmp_path / "50% off?").job(f"{GOOD}".replace("p.faiss", "qdrant-edge:s")).index
    assert index == f"qdrant-edge:{tmp_path}/50%25 off%3F/s"


def test_a_linked_file_starts_from_where_the_link_is(desk: Desk) -> None:
    (desk.path / "real").mkdir()
    (desk.path / "real" / "x.toml").write_text(f"[jobs.one]\n{GOOD}")
    (desk.path / "x.toml").symlink_to("real/x.toml")
    (found,) = read_jobs(desk.path / "x.toml").jobs
    assert found.clicks == desk.path / "clicks"


def test_a_relative_file_gives_absolute_paths(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(desk.path)
    desk.read(f"[jobs.one]\n{GOOD}")
    (found,) = read_jobs("jobs.toml").jobs
    assert found.index == f"faiss:{desk.path}/p.faiss"


def test_only_picks_jobs_and_checks_all(desk: Desk) -> None:
    text = f"[jobs.a]\n{GOOD}[jobs.b]\n{GOOD}[jobs.c]\n{GOOD}"
    for name in "abc":
        text = text.replace("'p.faiss'", f"'{name}.faiss'", 1)
    assert [job.name for job in desk.read(text, ("c", "a")).jobs] == ["a", "c"]
    assert desk.problems(text, ("d",)) == [" there is no job 'd'; known: a, b, c"]
    assert desk.problems(text + "seed = -1\n", ("a",))[0].startswith("10: job 'c': seed is -1")


def test_all_problems_are_told_at_once_in_the_order_of_lines(desk: Desk) -> None:
    text = """metrics = "no/where.prom"
cost_per_hour = -1
seed = 3
[defaults]
side = "left"
refit = { max_age_days = 3, drift = "yes" }

[jobs.products]
serach_params = { nprobe = 16 }
index = "p.faiss"
queries = "q.npy"
qrels = "qrels.tsv"
filter = "a=b"
[jobs.products.retention]
runs = 0
refiner = 3

[jobs."other one"]
index = "qdrant://localhost/x"
judgments = [
  "clicks",
]
device = "gpu"
"""
    starts = [
        "1: metrics names ",
        "2: cost_per_hour is -1; give a number from 0 up",
        "3: unknown key 'seed'; it belongs under [defaults] or [jobs.NAME]",
        "5: defaults: side is 'left'; choose docs or both",
        "6: defaults: refit.drift is 'yes'; give true or false",
        "9: job 'products': unknown key 'serach_params'; did you mean 'search_params'?",
        "11: job 'products': queries ",
        "13: job 'products': filter has no effect: ",
        "15: job 'products': retention.runs is 0; give a whole number from 1 up",
        "16: job 'products': unknown key 'retention.refiner'; did you mean 'refiners'?",
        "18: job 'other one': a name has ",
        "20: job 'other one': judgments is a list; give text between quotes",
        "23: job 'other one': device is 'gpu'; choose auto, cpu or cuda",
    ]
    found = desk.problems(text)
    assert [line[: len(start)] for line, start in zip(found, starts, strict=True)] == starts


@pytest.mark.parametrize(("key", "value", "words"), [
    ("index", "7", "index is a number; give text"),
    ("index", "''", "index is empty"),
    ("index", '"a\\nb"', "holds a line break"),
    ("index", '"a\\u0000b"', "holds a line break or another"),
    ("index", "'pinecone:x'", "unknown scheme 'pinecone:'; known: "),
    ("queries", "'nowhere.npy'", "nowhere.npy, which does not exist; give a file"),
    ("judgments", "'q.npy'", "q.npy, which is a file; create the folder"),
    ("judgments", "'nowhere'", "nowhere, which does not exist; create the folder"),
    ("labels", f"'{'x' * 300}'", "cannot be looked at: File name too long"),
    ("labels", "'~nobody-here/x'", "cannot be looked at: "),
    ("doc_id_field", "true", "doc_id_field is true or false; give text"),
    ("side", "'docs '", "side is 'docs '; choose docs or both"),
    ("side", "1", "side is 1; choose docs or both"),
    ("mode", "'inplace'", "choose in-place, new-vector or new-collection"),
    ("signal", "'clicks'", "choose auto, judged, groups, neighbours or augment"),
    ("measure", "'nDGC@10'", "measure 'nDGC@10' cannot be computed"),
    ("measure", "'P@0'", "measure 'P@0' cannot be computed"),
    ("growing", "1", "growing is 1; give true or false"),
    ("seed", "1.0", "seed is 1.0; give a whole number from 0 to 4294967295"),
    ("seed", "true", "seed is true; give a whole number"),
    ("seed", "4294967296", "seed is 4294967296;"),
    ("device", "'cuda:0'", "choose auto, cpu or cuda"),
    ("state", "'q.npy'", "q.npy, which is a file; give a folder"),
    ("window", "'22-05'", "window is '22-05'; write HH:MM-HH:MM"),
    ("window", "22:00:00", "window is a date or time; write HH:MM-HH:MM"),
    ("window", "'22:60-05:00'", "hours go from 00:00 to 24:00"),
    ("window", "'24:00-05:00'", "hours go from 00:00 to 24:00"),
    ("window", "'٢٢:00-05:00'", "write HH:MM-HH:MM"),
    ("window", "'05:00-05:00'", "leave it out where any time will do"),
    ("window", "'00:00-24:00'", "leave it out where any time will do"),
    ("rows_per_second", "0", "rows_per_second is 0; give a number above 0"),
    ("on_harm", "'stop'", "on_harm is 'stop'; choose alert or rollback"),
    ("rows_per_second", "inf", "rows_per_second is inf; give a number above 0"),
    ("refit", "30", "refit is a number; write a table"),
    ("refit.new_judgments", "10", "refit.new_judgments is 10; give a share above 0, up to 1"),
    ("refit.max_age_days", "nan", "refit.max_age_days is nan; give days above 0"),
    ("retention.runs", "0", "retention.runs is 0; give a whole number from 1 up"),
    ("search_params", "'nprobe=16'", "search_params is text; write a table"),
    ("search_params.nprobe", "'16'", "search_params.nprobe is '16'; give a finite number"),
    ("search_params.nprobe", "nan", "search_params.nprobe is nan; give a finite number"),
    ("query-ids", "'q.txt'", "unknown key 'query-ids'; did you mean 'query_ids'?"),
    ("zzz", "2", "unknown key 'zzz'; known: index, queries, "),
])  # fmt: skip
@pytest.mark.parametrize("place", ["defaults", "jobs.one"])
def test_wrong_values(desk: Desk, key: str, value: str, words: str, place: str) -> None:
    given = {"index": "'p.faiss'", "judgments": "'clicks'", "queries": "'q.parquet'"}
    if place == "jobs.one":
        given.pop(key, None)
    rest = "".join(f"{name} = {text}\n" for name, text in given.items())
    text = f"[{place}]\n# a comment\n{key} = {value}\n"
    text += rest if place == "jobs.one" else f"[jobs.one]\n{rest}"
    (found,) = desk.problems(text)
    who = "defaults" if place == "defaults" else "job 'one'"
    assert found.startswith(f"3: {who}: ")
    assert words in found


@pytest.mark.parametrize(("given", "line", "words"), [
    ("judgments = 'clicks'", 1, "it has no index"),
    ("index = 'p.faiss'", 1, "nothing to prove a gain with"),
    ("index = 'p.faiss'\nqueries = 'q.parquet'", 3, "queries needs qrels, the judgments"),
    ("index = 'p.faiss'\nqrels = 'qrels.tsv'", 3, "qrels needs queries, the vectors"),
    ("index = 'p.faiss'\nqueries = 'q.npy'\nqrels = 'qrels.tsv'", 3, "give query_ids"),
    (GOOD + "queries = 'q.npy'", 4, "holds no ids for the judgments to name; give query_ids"),
    (GOOD + "queries = 'q.parquet'\nquery_ids = 'q.txt'", 5, "leave query_ids out"),
    (GOOD + "queries = 'q.txt'", 4, "give a .npy, .parquet or .jsonl file"),
    ("index = 'p.faiss'\nlabels = 'labels.txt'\ndoc_ids = 'ids.txt'", 4, "doc_ids has no effect"),
    (GOOD + "test_queries = 'q.parquet'", 4, "test_queries needs either test_qrels or"),
    (GOOD + "dev_labels = 'labels.txt'", 4, "dev_labels needs dev_queries"),
    (GOOD + "filter = 'a=1'", 4, "filter has no effect: faiss:"),
    (GOOD + "guard_field = 'a'", 4, "guard_field has no effect"),
    (GOOD.replace("faiss", "npy") + "doc_id_field = 'a'", 4, "doc_id_field has no effect: rows of"),
    (GOOD + "mode = 'new-vector'", 4, "mode new-vector is not for faiss:"),
    (GOOD + "side = 'both'", 4, "choose docs"),
    (GOOD + "originals_ids = 'ids.txt'", 4, "originals_ids belongs to originals"),
    (GOOD + "originals = 'b.faiss'\noriginals_ids = 'ids.txt'", 5, "originals_ids belongs to"),
    (GOOD.replace("p.faiss", "qdrant://h/c") + "side = 'both'", 4,
     "choose mode new-vector or new-collection"),
    (GOOD.replace("p.faiss", "qdrant-edge:s") + "side = 'both'", 4, "choose mode new-vector"),
    (GOOD.replace("p.faiss", "qdrant-edge:s") + "mode = 'new-collection'", 4, "is not for qdrant"),
    (GOOD.replace("p.faiss", "qdrant-edge:s") + "originals = 'o.npy'", 4, "originals has no eff"),
    (GOOD.replace("p.faiss", "qdrant-edge:s") + "filter = '{a'", 4, "filter is not JSON"),
    (GOOD.replace("p.faiss", "qdrant-edge:s") + "filter = 'a'", 4, "or FIELD=VALUE"),
    (GOOD.replace("p.faiss", "qdrant-edge:s")
     + "doc_ids = 'ids.txt'\ndoc_id_field = 'sku'", 4, "doc_ids and doc_id_field say the same"),
])  # fmt: skip
def test_values_that_do_not_go_together(desk: Desk, given: str, line: int, words: str) -> None:
    found = desk.problems(f"[jobs.one]\n{given}\n")
    assert next(text for text in found if words in text).startswith(f"{line}: job 'one': ")
    assert len(found) == 1


def test_what_is_wrong_by_itself_is_not_missed_a_second_time(desk: Desk) -> None:
    text = "[jobs.one]\nindex = 'p.faiss'\nqueries = 'q.parquet'\nqrels = 'gone.tsv'\n"
    assert len(desk.problems(text)) == 1
    assert len(desk.problems("[jobs.one]\nindex = 'p.faiss'\njudgments = 'gone'")) == 1
    assert len(desk.problems("[defaults]\nindex = 3\n[jobs.one]\njudgments = 'clicks'")) == 1


def test_conflicts_with_a_default_have_its_line(desk: Desk) -> None:
    text = f"[defaults]\nside = 'both'\n[jobs.a]\n{GOOD}[jobs.b]\n{GOOD}"
    text = text.replace("'p.faiss'", "'other.faiss'", 1)
    found = desk.problems(text)
    assert [line.partition(": side")[0] for line in found] == ["2: job 'a'", "2: job 'b'"]


@pytest.mark.parametrize(("one", "other", "same"), [
    ("p.faiss", "faiss:./sub/../p.faiss", True),
    ("p.faiss", "link.faiss", True),
    ("p.faiss", "q.faiss", False),
    ("qdrant://localhost:6333/c?vector=a", "qdrant://LOCALHOST/c?vector=a&grpc=true", True),
    ("qdrant://localhost/c?vector=a", "qdrant://localhost/c?vector=b", False),
    ("qdrant://localhost/c", "qdrant://localhost:7333/c", False),
    ("qdrant://localhost/c", "qdrant://localhost/d", False),
    ("qdrant-edge:s?vector=a", "qdrant-edge:%73?vector=a", True),
    ("qdrant-local:s?collection=a", "qdrant-local:s?collection=b", False),
    ("e.npz?key=a", "npz:./e.npz?key=a&metric=dot", True),
    ("e.npz?key=a", "e.npz?key=b", False),
    ("qdrant://h/c?filter=a%3D1", "qdrant://h/c?filter=a%3D2", False),
])  # fmt: skip
def test_two_jobs_of_one_index_are_refused(desk: Desk, one: str, other: str, same: bool) -> None:
    (desk.path / "sub").mkdir()
    (desk.path / "link.faiss").symlink_to("p.faiss")
    text = "".join(
        f"[jobs.{name}]\nindex = '{uri}'\njudgments = 'clicks'\n"
        for name, uri in (("a", one), ("b", other))
    )
    if same:
        (found,) = desk.problems(text)
        assert found.startswith("4: job 'b': ")
        assert found.endswith(" is the index of job 'a' (line 1) too; keep one")
    else:
        assert len(desk.read(text).jobs) == 2


def test_tenants_of_one_index_are_jobs_of_their_own(desk: Desk) -> None:
    job = "[jobs.{}]\nindex = 'qdrant://h/c'\njudgments = 'clicks'\nfilter = '{}'\n"
    assert len(desk.read(job.format("a", "tenant=1") + job.format("b", "tenant=2")).jobs) == 2
    asjson = '{"must": [{"key": "tenant", "match": {"value": 1}}]}'
    assert len(desk.problems(job.format("a", "tenant=1") + job.format("b", asjson))) == 1
    assert desk.read(job.format("a", "token_type=1")).jobs[0].filter == "token_type=1"


def test_two_jobs_in_one_state_folder_are_refused(desk: Desk) -> None:
    text = f"[defaults]\nstate = 'state'\n[jobs.a]\n{GOOD}[jobs.b]\n{GOOD}"
    (found,) = desk.problems(text.replace("'p.faiss'", "'other.faiss'", 1))
    assert "job 'a' (line 3) keeps its state in" in found


@pytest.mark.parametrize("text", [
    "api_key = 'hunter2'",
    "QDRANT_API_KEY = 'hunter2'",
    "api-key = 'hunter2'",
    "password = 'hunter2'",
    "auth_token = ['hunter2']",
    "client_secret = { value = 'hunter2' }",
    "refit = { token = 'hunter2' }",
    "search_params = { api_key = 'hunter2' }",
    "search_params = { x = 'qdrant://me:hunter2@host' }",
    "originals = 'qdrant://me:hunter2@host/c'",
    "originals = 'qdrant://hunter2@host/c'",
    "originals = 'qdrant://host/c?api_key=hunter2'",
    "originals = 'odd://me:hunter2@host/c'",
    "side = 'https://me:hunter2@host/c'",
    "side = 'api_key=hunter2'",
    "measure = 'api_key=hunter2'",
    "auth = { value = 'hunter2' }",
    "queries = 'https://me:hunter2@host/q.npy'",
])  # fmt: skip
@pytest.mark.parametrize("place", ["defaults", "jobs.one"])
def test_secrets_are_refused_and_never_shown(desk: Desk, text: str, place: str) -> None:
    found = desk.problems(f"[{place}]\n{text}\n[jobs.two]\n{GOOD}")
    assert not [line for line in found if "hunter2" in line]
    assert [line for line in found if line.startswith("2: ")]


def test_a_secret_in_a_name_is_not_shown(desk: Desk) -> None:
    found = desk.problems(f"[jobs.'qdrant://me:hunter2@host/c']\n{GOOD}'api_key=hunter2' = 1\n")
    assert len(found) == 2
    assert not [line for line in found if "hunter2" in line]


def test_a_secret_at_the_top_is_refused(desk: Desk) -> None:
    (found,) = desk.problems(f"api_key = 'hunter2'\n[jobs.one]\n{GOOD}")
    assert found.startswith("1: 'api_key' looks like a secret; secrets come from the environment")
    assert "hunter2" not in found


@pytest.mark.parametrize(("text", "words"), [
    ("", "there are no jobs; write a table [jobs.NAME]"),
    ("# nothing\n", "there are no jobs"),
    ("[jobs]\n", "1: there are no jobs"),
    ("jobs = 3\n", "1: jobs is a number; write a table [jobs.NAME]"),
    (f"[[jobs]]\n{GOOD}", "1: jobs is a list; write a table [jobs.NAME]"),
    ("[jobs]\none = 3\n", "2: job 'one': it is a number; make it a table [jobs.one]"),
    (f"defaults = 3\n[jobs.one]\n{GOOD}", "1: defaults: it is a number"),
    (f"[job.one]\n{GOOD}", "1: unknown key 'job'; did you mean 'jobs'?"),
    ("[jobs.one]\nindex = 'p.faiss\n", "2: this is not TOML"),
])  # fmt: skip
def test_files_without_jobs(desk: Desk, text: str, words: str) -> None:
    found = desk.problems(text)
    assert [line for line in found if words in line]
    assert len(found) == 1 + text.startswith("[job.")


def test_a_missing_job_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no file .*jobs\.toml"):
        read_jobs(tmp_path / "jobs.toml")


@pytest.fixture(params=["UTC", "Europe/Berlin", "America/New_York"])
def zone(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("TZ", request.param)
    time.tzset()
    yield request.param
    monkeypatch.undo()
    time.tzset()


@given(start=st.integers(0, 1439), end=st.integers(1, 1440), second=st.integers(0, 86399))
def test_windows_hold_as_counting_minutes_says(start: int, end: int, second: int) -> None:
    if start == end % 1440:
        return
    window, midnight = Window(start=start, end=end), datetime(2026, 1, 15)
    inside = [(start + i) % 1440 for i in range((end - start) % 1440)]
    now = midnight + timedelta(seconds=second)
    assert window.holds(now) == (second // 60 in inside)
    left = window.seconds_left(now)
    if not window.holds(now):
        assert left == 0
        return
    assert 0 < left <= len(inside) * 60
    assert window.holds(now + timedelta(seconds=left - 1))
    assert not window.holds(now + timedelta(seconds=left))


def test_aware_times_are_taken_to_local_ones(zone: str) -> None:
    window = Window(start=22 * 60, end=5 * 60)
    for hour in range(24):
        naive = datetime(2026, 1, 15, hour, 30)
        aware = naive.astimezone().astimezone(timezone(timedelta(hours=9)))
        assert window.holds(naive) == window.holds(aware) == (hour >= 22 or hour < 5)
        assert window.seconds_left(naive) == window.seconds_left(aware)


@pytest.mark.parametrize(("day", "hours"), [((2026, 3, 29), 4), ((2026, 10, 25), 6)])
def test_nights_when_the_clock_changes_are_shorter_or_longer(
    monkeypatch: pytest.MonkeyPatch, day: tuple[int, int, int], hours: int
) -> None:
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    try:
        window = Window(start=22 * 60, end=5 * 60)
        assert window.seconds_left(datetime(*day)) == hours * 3600
        early = Window(start=60, end=2 * 60 + 30)
        twice = datetime(2026, 10, 25, 2, 10)
        assert early.seconds_left(twice) == early.seconds_left(twice.replace(fold=1)) == 20 * 60
    finally:
        monkeypatch.undo()
        time.tzset()


def test_jobs_cannot_be_changed_by_accident(desk: Desk) -> None:
    job = desk.job(GOOD)
    assert replace(job, seed=1) != job
    with pytest.raises(AttributeError):
        job.seed = 1  # type: ignore[misc]


def test_clicks_roll_nothing_back(desk: Desk) -> None:
    with pytest.raises(ConfigError, match="favour what was live"):
        desk.job(GOOD + '\non_harm = "rollback"')
