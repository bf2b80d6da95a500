"""Workers as actors of Ray, which starts them, finds them machines, and replaces lost ones."""

from __future__ import annotations

import logging
import os
import re
from collections import deque
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from simskip_vdb.errors import MissingDependencyError, SimskipError, TransientStoreError

log = logging.getLogger(__name__)

_RETRIES = 3  # of a job whose worker was lost


class RayPool:
    """As many actors as there are cores for, each with one job at a time.

    Args:
        worker: The class of the actors.
        arguments: What each is made with.
        most: Most actors that are of use.

    Raises:
        MissingDependencyError: Ray is not installed.
        TransientStoreError: The cluster cannot be reached.
    """

    def __init__(self, worker: type, arguments: tuple[Any, ...], *, most: int) -> None:
        self._worker, self._arguments, self._most = worker, arguments, most
        self._actors: list[Any] = []
        self._mine = False

    def __enter__(self) -> RayPool:
        try:
            import ray
        except ImportError:
            raise MissingDependencyError("ray", "ray") from None
        if not ray.is_initialized():
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            try:
                ray.init(include_dashboard=False, log_to_driver=False, logging_level="WARNING")
            except (OSError, RuntimeError, ValueError) as error:
                raise TransientStoreError(
                    f"Ray cannot be reached or started: {error}; check RAY_ADDRESS"
                ) from error
            self._mine = True
        cores = int(ray.cluster_resources().get("CPU", 1))
        count = max(1, min(self._most, cores))
        log.info("%d workers on Ray", count)
        actor = ray.remote(num_cpus=1, max_restarts=-1, max_task_retries=_RETRIES)(self._worker)
        self._actors = [actor.remote(*self._arguments) for _ in range(count)]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        import ray

        for actor in self._actors:
            ray.kill(actor)
        if self._mine:
            ray.shutdown()

    def run(self, method: str, jobs: Sequence[Any], done: Callable[[Any, Any], None]) -> None:
        """Do every job; see `crew.Pool.run`."""
        import ray

        waiting, idle = deque(jobs), list(self._actors)
        busy: dict[Any, tuple[Any, Any]] = {}
        failed: SimskipError | None = None
        while busy or (waiting and failed is None):
            while idle and waiting and failed is None:
                actor, job = idle.pop(), waiting.popleft()
                busy[getattr(actor, method).remote(job)] = (actor, job)
            (ready, *_), _ = ray.wait(list(busy))
            actor, job = busy.pop(ready)
            idle.append(actor)
            try:
                done(job, _result(ready, job))
            except SimskipError as error:
                failed = failed or error
        if failed is not None:
            raise failed


def _result(reference: Any, job: Any) -> Any:  # noqa: ANN401
    """Return what a worker did; raise what it raised, as if it had been done here."""
    import ray
    from ray.exceptions import RayError, RayTaskError

    try:
        return ray.get(reference)
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, SimskipError):
            raise cause from None
        raise
    except RayError as error:
        lines = re.findall(r"^\w+(?:Error|Exception): .*$", str(error), re.MULTILINE)
        raise TransientStoreError(
            f"partition {job.partition.name}: its worker was lost {_RETRIES + 1} times "
            f"({lines[-1] if lines else type(error).__name__}); nothing else was lost, and the "
            "same command resumes"
        ) from error
