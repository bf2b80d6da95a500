from __future__ import annotations

import os
import re
import runpy
import shutil
import signal
import stat
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from simskip_vdb import jobs, metrics
from simskip_vdb.clicks import read_clicks
from simskip_vdb.errors import ConfigError
from simskip_vdb.jobs import Refit, Retention, Window, read_jobs

DOCS = Path(__file__).resolve().parents[1] / "docs"
RECIPES = DOCS / "recipes"
NIGHTLY = (DOCS / "nightly.md").read_text(encoding="utf-8")
COMMAND = ["simskip", "nightly", "/etc/simskip/jobs.toml", "--log-format", "json"]

FAKE = """#!/bin/sh
# Ends with the codes in a file, one a call, and notes its calls.
cd "$(dirname "$0")"
echo "$* key=${QDRANT_API_KEY:-}" >>calls
echo "the summary"
echo "a log line" >&2
trap 'echo finished >>calls; exit 4' TERM
[ -e hang ] && { touch hangs; i=0; while [ $i -lt 200 ]; do sleep 0.05; i=$((i + 1)); done; }
exit "$(sed -n "$(wc -l <calls)p" codes)"
"""


class Fake:
    """Stands in for simskip."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._write(path / "simskip", FAKE)

    def _write(self, path: Path, text: str) -> None:
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    @property
    def environment(self) -> dict[str, str]:
        return {"PATH": f"{self.path}:{os.environ['PATH']}"}

    def will_end_with(self, *codes: int) -> None:
        (self.path / "calls").unlink(missing_ok=True)
        (self.path / "codes").write_text("".join(f"{code}\n" for code in codes))

    @property
    def calls(self) -> list[str]:
        return (self.path / "calls").read_text().splitlines()


@pytest.fixture
def fake(tmp_path: Path) -> Fake:
    (tmp_path / "bin").mkdir()
    return Fake(tmp_path / "bin")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", NIGHTLY, re.DOTALL)


def indented(first: str) -> list[str]:
    """Return the indented block of the page that begins with these words."""
    found = next(
        block for block in re.findall(r"((?:^    .*\n)+)", NIGHTLY, re.M) if first in block
    )
    return [line[4:] for line in found.splitlines()]


def example(folder: Path) -> str:
    """Put the page's job file into a folder, with what it names."""
    (text,) = blocks("toml")
    for name in ("clicks", "paper-clicks", "judged", "metrics"):
        (folder / name).mkdir()
    for name in ("q.npy", "q.txt", "qrels.tsv", "ids.txt"):
        (folder / "judged" / name).touch()
    text = text.replace("/var/lib/prometheus/node-exporter", str(folder / "metrics"))
    (folder / "jobs.toml").write_text(text, encoding="utf-8")
    return text


def test_the_example_of_a_job_file_is_right(tmp_path: Path) -> None:
    example(tmp_path)
    found = read_jobs(tmp_path / "jobs.toml")
    products, papers, tenant = found.jobs
    assert found.metrics == tmp_path / "metrics" / "simskip.prom"
    assert (products.name, papers.name, tenant.name) == ("products", "papers", "tenant-7")
    assert products.window == papers.window == Window(start=22 * 60, end=5 * 60 + 30)
    assert tenant.window == Window(start=60, end=3 * 60)
    assert products.refit == Refit()
    assert products.retention == Retention()
    assert (products.growing, papers.growing) == (True, False)
    assert papers.index == f"faiss:{tmp_path}/papers.faiss"


def test_the_page_names_every_key() -> None:
    page = re.sub(r"(dev|test)_", "", NIGHTLY)
    words = set(re.findall(r"\w+", page)) | {"dev_qrels"}
    for key in (*jobs._KEYS, *jobs._TOP, *(f.name for f in (*fields(Refit), *fields(Retention)))):
        assert re.sub(r"^(dev|test)_", "", key) in words, key


def test_problems_look_as_the_page_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = indented("jobs.toml has 2 problems")
    monkeypatch.chdir(tmp_path)
    Path("clicks").mkdir()
    Path("jobs.toml").write_text(
        "\n\n\n[jobs.products]\nindex = 'p.faiss'\njudgments = 'clicks'\n"
        "serach_params = { nprobe = 16 }\n\nwindow = '22-05'\n"
    )
    with pytest.raises(ConfigError) as caught:
        read_jobs("jobs.toml")
    assert str(caught.value).splitlines() == shown


def test_the_example_of_a_click_log_is_right(tmp_path: Path) -> None:
    (tmp_path / "clicks.jsonl").write_text("\n".join(indented('{"id": "q81"')))
    found = read_clicks(tmp_path)
    assert found is not None
    assert found.ids == ("q81", "q97")
    assert found.qrels is not None
    assert found.qrels.grades.tolist() == [1, 2, 1, 1]


def test_the_page_names_every_metric_and_alerts_name_no_other() -> None:
    named = set(re.findall(r"`(simskip_\w+)`", NIGHTLY))
    named |= {f"simskip_rows{end}" for end in re.findall(r"`(_\w+)`", NIGHTLY)}
    assert named == set(metrics._FAMILIES)
    alerts = re.findall(r"simskip_\w+", (RECIPES / "alerts.yaml").read_text())
    assert len(alerts) > 3
    assert set(alerts) <= named


def test_the_page_points_to_files_that_exist() -> None:
    linked = set(re.findall(r"\]\((recipes/[^)]+)\)", NIGHTLY))
    assert linked == {f"recipes/{path.name}" for path in RECIPES.iterdir() if path.is_file()}


def script(fake: Fake, tries: int = 3) -> subprocess.CompletedProcess[str]:
    settings = {
        "SIMSKIP_ENV": str(fake.path / "env"),
        "SIMSKIP_LOG": str(fake.path / "log"),
        "SIMSKIP_TRIES": str(tries),
        "SIMSKIP_PAUSE": "0",
    }
    return subprocess.run(
        ["/bin/sh", RECIPES / "simskip-nightly.sh"],
        env={**fake.environment, **settings},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(("codes", "code", "calls"), [
    ([0], 0, 1), ([3], 0, 1), ([1], 1, 1), ([2], 2, 1), ([130], 130, 1), ([4, 0], 0, 2),
    ([4, 4, 3], 0, 3), ([4, 1], 1, 2), ([4, 4, 4, 0], 4, 3),
])  # fmt: skip
def test_the_script_for_cron_speaks_only_where_a_person_is_needed(
    fake: Fake, codes: list[int], code: int, calls: int
) -> None:
    (fake.path / "env").write_text("QDRANT_API_KEY=of-the-file\n")
    fake.will_end_with(*codes)
    done = script(fake)
    assert (done.returncode, done.stderr) == (code, "")
    assert fake.calls == [" ".join([*COMMAND[1:], "key=of-the-file"])] * calls
    assert (fake.path / "log").read_text() == "a log line\n" * calls
    if code == 0:
        assert done.stdout == ""
    else:
        assert done.stdout.startswith("the summary\n")
        assert f"ended with exit code {code}; the log is {fake.path}/log" in done.stdout


def test_the_script_needs_no_file_of_secrets(fake: Fake) -> None:
    fake.will_end_with(0)
    assert script(fake).returncode == 0


def test_the_script_can_be_run() -> None:
    assert os.access(RECIPES / "simskip-nightly.sh", os.X_OK)


def test_the_crontab_calls_the_script() -> None:
    text = (RECIPES / "crontab").read_text()
    (line,) = [row for row in text.splitlines() if re.match(r"[0-9*]", row)]
    *when, user, command = line.split()
    assert (when, user) == (["5", "22", "*", "*", "*"], "simskip")
    assert command == "/usr/local/bin/simskip-nightly"
    assert text.endswith("\n")  # cron passes over a last line without its end
    assert re.search(r"^SIMSKIP_LOG=", text, re.M)


def unit(name: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in (RECIPES / name).read_text().splitlines():
        if "=" in line and not line.startswith("#"):
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


def test_the_service_maps_exit_codes() -> None:
    service = unit("simskip-nightly.service")
    assert service["ExecStart"] == [f"/usr/local/bin/{' '.join(COMMAND)}"]
    assert service["SuccessExitStatus"] == ["3"]
    assert service["RestartForceExitStatus"] == ["4"]
    assert service["Restart"] == ["no"]
    assert service["Type"] != ["oneshot"]


def test_systemd_takes_the_units(tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd is not installed")
    for name in ("simskip-nightly.service", "simskip-nightly.timer"):
        text = (RECIPES / name).read_text().replace("/usr/local/bin/simskip", "/bin/true")
        (tmp_path / name).write_text(text)
    units = sorted(tmp_path.iterdir())
    done = subprocess.run([analyze, "verify", *units], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    (when,) = unit("simskip-nightly.timer")["OnCalendar"]
    done = subprocess.run([analyze, "calendar", when], capture_output=True, text=True, check=False)
    assert done.returncode == 0


def cronjob() -> list[Any]:
    yaml = pytest.importorskip("yaml")
    return list(yaml.safe_load_all((RECIPES / "cronjob.yaml").read_text()))


def test_kubernetes_takes_the_cronjob() -> None:
    validate = pytest.importorskip("kubernetes_validate")
    for manifest in cronjob():
        validate.validate(manifest, validate.latest_version(), strict=True)


def test_the_cronjob_maps_exit_codes() -> None:
    job = cronjob()[1]["spec"]
    run = job["jobTemplate"]["spec"]
    pod = run["template"]["spec"]
    (container,) = pod["containers"]
    assert job["concurrencyPolicy"] == "Forbid"
    assert pod["restartPolicy"] == "Never"
    rule = run["podFailurePolicy"]["rules"][0]
    assert rule["onExitCodes"] == {
        "containerName": container["name"], "operator": "In", "values": [1, 2],
    }  # fmt: skip
    assert " ".join(COMMAND) in container["args"][0]
    assert [entry["name"] for entry in container["env"]] == ["QDRANT_API_KEY"]
    assert "secretKeyRef" in container["env"][0]["valueFrom"]
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}


def container_command() -> list[str]:
    container = cronjob()[1]["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"][0]
    return [*container["command"], *container["args"]]


@pytest.mark.parametrize(("code", "expected"), [(0, 0), (1, 1), (2, 2), (3, 0), (4, 4), (130, 130)])
def test_the_container_maps_exit_codes(fake: Fake, code: int, expected: int) -> None:
    fake.will_end_with(code)
    done = subprocess.run(
        container_command(), env=fake.environment, capture_output=True, check=False
    )
    assert done.returncode == expected
    assert fake.calls == [" ".join([*COMMAND[1:], "key="])]


def test_the_container_hands_sigterm_on_and_waits(fake: Fake) -> None:
    fake.will_end_with(0)
    (fake.path / "hang").touch()
    with subprocess.Popen(
        container_command(), env=fake.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        patience = time.monotonic() + 10
        while not (fake.path / "hangs").exists():
            assert time.monotonic() < patience
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=10) == 4
    assert fake.calls[-1] == "finished"


class Skip(Exception): ...


class Retry(Exception): ...


class Fail(Exception): ...


def _airflow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put stand-ins for the parts of Airflow that the DAG imports in its place."""

    class Anything:
        def __init__(self, **settings: Any) -> None:  # noqa: ANN401
            self.settings = settings

        def __enter__(self) -> None: ...

        def __exit__(self, *error: object) -> None: ...

    class Hook:
        def run_command(self, command: list[str]) -> subprocess.CompletedProcess[bytes]:
            done = subprocess.run(command, capture_output=True, check=False)
            done.exit_code = done.returncode  # type: ignore[attr-defined]
            return done

    parts: dict[str, dict[str, Any]] = {
        "airflow.providers.standard.hooks.subprocess": {"SubprocessHook": Hook},
        "airflow.sdk": {"DAG": Anything, "BaseOperator": Anything},
        "airflow.sdk.exceptions": {
            "AirflowException": Retry,
            "AirflowFailException": Fail,
            "AirflowSkipException": Skip,
        },
    }
    for name, content in parts.items():
        module = ModuleType(name)
        vars(module).update(content)
        for part in range(1, name.count(".") + 1):
            parent = ".".join(name.split(".")[:part])
            if parent not in parts:
                monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize(("code", "outcome"), [
    (0, None), (1, Fail), (2, Fail), (3, Skip), (4, Retry), (130, Fail),
])  # fmt: skip
def test_the_dag_tells_what_exit_codes_mean(
    fake: Fake, monkeypatch: pytest.MonkeyPatch, code: int, outcome: type[Exception] | None
) -> None:
    _airflow(monkeypatch)
    monkeypatch.setenv("PATH", fake.environment["PATH"])
    found = runpy.run_path(str(RECIPES / "airflow_dag.py"))
    operator = found["NightlyOperator"]()
    fake.will_end_with(code)
    if outcome is None:
        operator.execute({})
    else:
        with pytest.raises(outcome):
            operator.execute({})
    assert found["COMMAND"] == COMMAND
    assert fake.calls == [" ".join([*COMMAND[1:], "key="])]


def test_airflow_takes_the_dag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIRFLOW_HOME", str(tmp_path))
    dagbag = pytest.importorskip("airflow.dag_processing.dagbag")
    (tmp_path / "dags").mkdir()
    shutil.copy(RECIPES / "airflow_dag.py", tmp_path / "dags")
    bag = dagbag.DagBag(str(tmp_path / "dags"))
    assert bag.import_errors == {}
    assert list(bag.dags) == ["simskip_nightly"]
