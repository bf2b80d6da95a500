"""Calls of a Qdrant client: errors of this project instead of the client's, and retries."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
import httpx
from qdrant_client import QdrantClient
from qdrant_client.common.client_exceptions import QdrantException, ResourceExhaustedResponse
from qdrant_client.http.exceptions import (
    ApiException,
    ResponseHandlingException,
    UnexpectedResponse,
)
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    retry_if_not_exception_type,
    stop_after_attempt,
    wait_random_exponential,
)

from simskip_vdb.errors import StoreError, StoreNotFoundError, TransientStoreError

_Result = TypeVar("_Result")

_TOO_MANY = 429
_TRANSIENT_STATUS = {408, 423, 425, _TOO_MANY}
_TRANSIENT_CODES = {
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.UNKNOWN,
}
_NO_ENTRY = {401, 403}
_NO_ENTRY_CODES = {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED}


@dataclass(frozen=True, slots=True, kw_only=True)
class Retries:
    """How long a failing call is tried again.

    Attributes:
        attempts: Tries of one call, the first one included.
        first: Upper bound of the first random wait, seconds; it doubles with each attempt.
        most: Upper bound of every random wait, seconds; ``Retry-After`` may ask for more.
        sleep: Waits for so many seconds.
    """

    attempts: int = 9
    first: float = 0.5
    most: float = 30.0
    sleep: Callable[[float], None] = time.sleep


class _Busy(TransientStoreError):
    """The server said for how many seconds to stay away."""

    def __init__(self, message: str, seconds: float) -> None:
        super().__init__(message)
        self.seconds = seconds


class _GivenUp(TransientStoreError):
    """All tries of a call failed; an action that contains it is not tried again."""


class Calls:
    """A client whose methods are called by name."""

    def __init__(self, client: QdrantClient, uri: str, retries: Retries) -> None:
        """Take the client, the store's address for messages, and the patience there is."""
        self.client = client
        self.uri = uri
        self._retries = retries

    def __call__(self, method: str, **arguments: Any) -> Any:  # noqa: ANN401 as the client's
        """Call a method until it succeeds.

        Raises:
            StoreNotFoundError: There is no such collection or point.
            TransientStoreError: It kept failing.
            StoreError: The server, or the client, refuses.
        """
        return self.retry(lambda: self.once(method, **arguments))

    def once(self, method: str, **arguments: Any) -> Any:  # noqa: ANN401 as the client's
        """Call a method one time; raises what calling the object raises."""
        try:
            return getattr(self.client, method)(**arguments)
        except StoreError:
            raise
        except Exception as error:
            raise translated(error, f"{self.uri}: {method}") from error

    def retry(
        self, action: Callable[[], _Result], *, also: type[StoreError] | None = None
    ) -> _Result:
        """Repeat an action while it fails with TransientStoreError, or with `also`, at once."""
        kinds = (TransientStoreError,) if also is None else (TransientStoreError, also)
        repeat = Retrying(
            stop=stop_after_attempt(self._retries.attempts),
            wait=self._pause,
            retry=retry_if_exception_type(kinds) & retry_if_not_exception_type(_GivenUp),
            sleep=self._retries.sleep,
            reraise=True,
        )
        try:
            return repeat(action)
        except _GivenUp:
            raise
        except TransientStoreError as error:
            raise _GivenUp(f"{error} (tried {self._retries.attempts} times)") from error

    def _pause(self, state: RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        if not isinstance(error, TransientStoreError):
            return 0.0
        random = wait_random_exponential(self._retries.first, self._retries.most)
        return max(random(state), getattr(error, "seconds", 0.0))


def translated(error: Exception, what: str) -> StoreError:
    """Return the project's error for one of the client's."""
    if isinstance(error, ResourceExhaustedResponse):
        return _Busy(f"{what}: too many requests: {error}", error.retry_after_s)
    if isinstance(error, UnexpectedResponse):
        return _by_status(error, what)
    if isinstance(error, grpc.RpcError):
        return _by_code(error, what)
    cause = error.source if isinstance(error, ResponseHandlingException) else error
    if isinstance(cause, (httpx.TransportError, ConnectionError, TimeoutError)):
        return TransientStoreError(
            f"{what}: no answer ({type(cause).__name__}: {cause}); does the server run, and are "
            "host, port and http or https right?"
        )
    if isinstance(error, KeyError):  # how local mode says 404
        return StoreNotFoundError(f"{what}: there is no {error}")
    if isinstance(error, (ApiException, QdrantException)):
        return StoreError(f"{what}: {type(cause).__name__}: {cause}")
    return StoreError(f"{what}: {type(error).__name__}: {error}")


def _by_status(error: UnexpectedResponse, what: str) -> StoreError:
    status = error.status_code or 0
    said = f"{what}: the server answered {status}: {_reason(error)}"
    if status == 404:
        return StoreNotFoundError(said)
    if status in _NO_ENTRY:
        return StoreError(f"{said}; the environment's QDRANT_API_KEY must allow this")
    if status == _TOO_MANY:
        return _Busy(said, _seconds(error.headers.get("retry-after")))
    if status in _TRANSIENT_STATUS or status >= 500:
        return TransientStoreError(said)
    return StoreError(said)


def _by_code(error: grpc.RpcError, what: str) -> StoreError:
    code = error.code() if hasattr(error, "code") else grpc.StatusCode.UNKNOWN
    details = error.details() if hasattr(error, "details") else str(error)
    said = f"{what}: the server answered {code.name}: {details}"
    if code is grpc.StatusCode.NOT_FOUND:
        return StoreNotFoundError(said)
    if code in _NO_ENTRY_CODES:
        return StoreError(f"{said}; the environment's QDRANT_API_KEY must allow this")
    return TransientStoreError(said) if code in _TRANSIENT_CODES else StoreError(said)


def _reason(error: UnexpectedResponse) -> str:
    try:
        return str(error.structured()["status"]["error"])
    except (ValueError, KeyError, TypeError):
        return f"{error.reason_phrase} {error.content[:200].decode(errors='replace')}".strip()


def _seconds(header: str | None) -> float:
    try:
        return max(0.0, float(header or 0))
    except ValueError:
        return 0.0
