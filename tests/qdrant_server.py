"""Qdrant's REST interface over the client's local mode: what the client sends, and gets back.

It shows that requests are well-formed and answers understood; how a server behaves it cannot show.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
from pydantic_core import to_jsonable_python
from qdrant_client import QdrantClient, models

_C = r"/collections/(?P<c>[^/]+)"


class Server:
    """Answers requests; `client` is what a program under test is given.

    Attributes:
        local: The collections, to be looked at and changed behind the program's back.
        version: What the server says it is.
        config: What it says of a collection's configuration, over what is so.
        status: What it says of the optimisers, one after the other; then ``green``.
        seen: Method and path of every request, with its body.
        between: Called before each request, when other programs may send theirs.
        watch: Hears of every request.
        fault: Asked before each request, by method with path and by body; what it returns is
            answered instead, and what it raises is what the client's transport raises.
    """

    def __init__(self, version: str = "1.20.1") -> None:
        self.local = QdrantClient(":memory:")
        self.version = version
        self.config: dict[str, Any] = {}
        self.status: list[str] = []
        self.seen: list[tuple[str, Any]] = []
        self.watch: Callable[[httpx.Request], None] = lambda request: None
        self.fault: Callable[[str, Any], httpx.Response | None] = lambda name, body: None
        self.between: Callable[[], None] = lambda: None
        self._lock = threading.Lock()
        self.client = QdrantClient(
            url="http://qdrant.test:6333",
            check_compatibility=False,
            transport=httpx.MockTransport(self._answer),
        )

    @contextmanager
    def listening(self) -> Iterator[str]:
        """Answer other processes, too; give the address."""
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = 1 << 16  # a header and a body sent apart are waited for

            def _any(self) -> None:
                content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                request = httpx.Request(self.command, f"http://here{self.path}", content=content)
                answer = server._answer(request)
                self.send_response(answer.status_code)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(answer.content)))
                self.end_headers()
                self.wfile.write(answer.content)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _any

            def log_message(self, *arguments: object) -> None:
                pass

        listener = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=listener.serve_forever)
        thread.start()
        try:
            yield f"127.0.0.1:{listener.server_port}"
        finally:
            listener.shutdown()
            thread.join()
            listener.server_close()

    def close(self) -> None:
        self.client.close()
        self.local.close()

    def bodies(self, request: str) -> list[Any]:
        return [body for name, body in self.seen if re.fullmatch(request, name)]

    def _answer(self, request: httpx.Request) -> httpx.Response:
        name = f"{request.method} {request.url.path}"
        body = json.loads(request.content) if request.content else {}
        self.between()
        with self._lock:
            self.seen.append((name, body))
            self.watch(request)
            try:
                return self.fault(name, body) or _ok(self.carry_out(name, body))
            except (KeyError, ValueError) as error:
                missing = isinstance(error, KeyError) or "not found" in str(error)
                answer = {"status": {"error": f"Not found: {error}" if missing else str(error)}}
                return httpx.Response(404 if missing else 400, json=answer)

    def carry_out(self, name: str, body: dict[str, Any]) -> Any:  # noqa: ANN401
        """Do what a request asks for, and return what is answered."""
        if name == "GET /":
            return models.VersionInfo(title="qdrant", version=self.version)
        if name == "GET /aliases":
            return self.local.get_aliases()
        if name == "GET /collections":
            return self.local.get_collections()
        if name == "POST /collections/aliases":
            actions = models.ChangeAliasesOperation.model_validate(body).actions
            return self.local.update_collection_aliases(actions)
        for pattern, action in _ROUTES.items():
            if match := re.fullmatch(pattern, name):
                return action(self, body=body, **match.groupdict())
        raise NotImplementedError(name)

    def _describe(self, c: str, body: Any, **names: str) -> Any:  # noqa: ANN401
        answer = to_jsonable_python(self.local.get_collection(c))
        _merge(answer["config"], self.config)
        answer["status"] = self.status.pop(0) if self.status else "green"
        return answer

    def _exists(self, c: str, body: Any, **names: str) -> Any:  # noqa: ANN401
        return {"exists": self.local.collection_exists(c)}

    def _create(self, c: str, body: Any, **names: str) -> Any:  # noqa: ANN401
        wanted = models.CreateCollection.model_validate(body)
        return self.local.create_collection(
            c, wanted.vectors, wanted.sparse_vectors, metadata=wanted.metadata
        )

    def _update(self, c: str, body: Any, **names: str) -> Any:  # noqa: ANN401
        return self.local.update_collection(c, metadata=body.get("metadata"))

    def _drop(self, c: str, body: Any, **names: str) -> Any:  # noqa: ANN401
        return self.local.delete_collection(c)

    def _scroll(self, c: str, body: Any, **names: str) -> Any:  # noqa: ANN401
        r = models.ScrollRequest.model_validate(body)
        points, after = self.local.scroll(
            c,
            r.filter,
            r.limit or 10,
            offset=r.offset,
            with_payload=r.with_payload or False,
            with_vectors=r.with_vector or False,
        )
        return {"points": points, "next_page_offset": after}

    def _retrieve(self, c: str, body: Any, **names: str) -> Any:  # noqa: ANN401
        r = models.PointRequest.model_validate(body)
        return self.local.retrieve(c, r.ids, r.with_payload or False, r.with_vector or False)

    def _count(self, c: str, body: Any, **names: str) -> Any:  # noqa: ANN401
        return self.local.count(c, models.CountRequest.model_validate(body).filter)

    def _query(self, c: str, body: Any, **names: str) -> Any:  # noqa: ANN401
        searches = models.QueryRequestBatch.model_validate(body).searches
        for search in searches:
            search.params = None  # of which local mode warns
        return self.local.query_batch_points(c, searches)

    def _vectors(self, c: str, body: Any, **names: str) -> Any:  # noqa: ANN401
        r = models.UpdateVectors.model_validate(body)
        return self.local.update_vectors(c, r.points, update_filter=r.update_filter)

    def _upsert(self, c: str, body: Any, **names: str) -> Any:  # noqa: ANN401
        return self.local.upsert(c, models.PointsList.model_validate(body).points)

    def _annotate(self, c: str, body: Any, **names: str) -> Any:  # noqa: ANN401
        r = models.SetPayload.model_validate(body)
        return self.local.set_payload(c, r.payload, r.points or [])

    def _delete(self, c: str, body: Any, **names: str) -> Any:  # noqa: ANN401
        return self.local.delete(c, models.PointIdsList.model_validate(body).points)

    def _add_vector(self, c: str, body: Any, **names: str) -> Any:  # noqa: ANN401
        config = models.DenseVectorNameConfig.model_validate(body)
        return self.local.create_vector_name(c, names["v"], config)

    def _drop_vector(self, c: str, body: Any, **names: str) -> Any:  # noqa: ANN401
        return self.local.delete_vector_name(c, names["v"])


_ROUTES: dict[str, Any] = {
    rf"GET {_C}": Server._describe,
    rf"GET {_C}/exists": Server._exists,
    rf"PUT {_C}": Server._create,
    rf"PATCH {_C}": Server._update,
    rf"DELETE {_C}": Server._drop,
    rf"POST {_C}/points": Server._retrieve,
    rf"PUT {_C}/points": Server._upsert,
    rf"POST {_C}/points/scroll": Server._scroll,
    rf"POST {_C}/points/count": Server._count,
    rf"POST {_C}/points/query/batch": Server._query,
    rf"PUT {_C}/points/vectors": Server._vectors,
    rf"POST {_C}/points/payload": Server._annotate,
    rf"POST {_C}/points/delete": Server._delete,
    rf"PUT {_C}/vectors/(?P<v>[^/]+)": Server._add_vector,
    rf"DELETE {_C}/vectors/(?P<v>[^/]+)": Server._drop_vector,
}


def _ok(result: Any) -> httpx.Response:  # noqa: ANN401
    plain = to_jsonable_python(result)
    bare = isinstance(result, models.VersionInfo)
    return httpx.Response(200, json=plain if bare else {"status": "ok", "time": 0, "result": plain})


def _merge(into: dict[str, Any], over: dict[str, Any]) -> None:
    for name, value in over.items():
        if isinstance(value, dict) and isinstance(into.get(name), dict):
            _merge(into[name], value)
        else:
            into[name] = value
