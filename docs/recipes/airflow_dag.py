"""A DAG for Airflow 3 that looks after vector indexes every night.

The worker needs simskip-vdb, the job file, and secrets such as QDRANT_API_KEY in its environment.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from airflow.providers.standard.hooks.subprocess import SubprocessHook
from airflow.sdk import DAG, BaseOperator
from airflow.sdk.exceptions import AirflowException, AirflowFailException, AirflowSkipException

COMMAND = ["simskip", "nightly", "/etc/simskip/jobs.toml", "--log-format", "json"]


class NightlyOperator(BaseOperator):
    """Runs the jobs, and tells Airflow what the exit code means.

    0 done: success · 3 the gate refused: skipped · 4 stopped part-way: tried again, as the same
    command resumes · 1 failed, 2 wrong usage: failed, and not tried again.
    """

    hook: SubprocessHook | None = None

    def execute(self, context):
        self.hook = SubprocessHook()
        code = self.hook.run_command(COMMAND).exit_code
        if code == 3:
            raise AirflowSkipException("the gate refused; nothing was written")
        if code == 4:
            raise AirflowException("stopped part-way; the next try resumes")
        if code:
            raise AirflowFailException(f"simskip nightly ended with exit code {code}")

    def on_kill(self):
        """Pass SIGTERM on, which finishes the batch."""
        if self.hook is not None:
            self.hook.send_sigterm()


with DAG(
    dag_id="simskip_nightly",
    schedule="5 22 * * *",
    start_date=datetime(2025, 1, 1),
    catchup=False,
    max_active_runs=1,
):
    NightlyOperator(
        task_id="nightly",
        retries=3,
        retry_delay=timedelta(minutes=10),
        execution_timeout=timedelta(hours=8),
    )
