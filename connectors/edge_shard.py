"""The folder of a Qdrant Edge shard: opened, described, and its errors made typed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import qdrant_edge as edge

from simskip_vdb.connectors.folders import nothing_at
from simskip_vdb.connectors.qdrant_points import metric_of, rounding_of
from simskip_vdb.datatypes import Metric
from simskip_vdb.durable import disk_errors, json_of
from simskip_vdb.errors import (
    SimskipError,
    StoreError,
    UnsupportedIndexError,
)

_CONFIG = "edge_config.json"
_HNSW = {"m": 16, "ef_construct": 100}
_DATATYPES = {
    None: None,
    "float32": edge.VectorStorageDatatype.Float32,
    "float16": edge.VectorStorageDatatype.Float16,
}

_MAX_SIM = edge.MultiVectorConfig(edge.MultiVectorComparator.MaxSim)


@dataclass(frozen=True, slots=True, kw_only=True)
class VectorSettings:
    """What a shard's configuration says of one vector.

    Attributes:
        dim: Dimension.
        metric: How it is compared.
        distance: The same in the engine's terms.
        datatype: How it is stored, in the engine's terms; None for its default, float32.
        rounding: Relative L2 distance within which it is read back.
        hnsw: ``m`` and ``ef_construct`` of its graph.
        quantization: Kind of the codes beside it, such as ``scalar``; None where there are none.
        multi: How a point's several vectors under the name are compared, in the engine's terms;
            None where it has one.
    """

    dim: int
    metric: Metric
    distance: edge.Distance
    datatype: edge.VectorStorageDatatype | None
    rounding: float
    hnsw: Mapping[str, int]
    quantization: str | None
    multi: edge.MultiVectorConfig | None

    @property
    def exact(self) -> bool:
        """True where every vector is read back bit for bit; cosine forgets its length."""
        return self.metric is not Metric.COSINE and self.datatype in (
            None,
            edge.VectorStorageDatatype.Float32,
        )


@contextmanager
def engine_call(uri: str, doing: str) -> Iterator[None]:
    """Turn the engine's errors and panics into `StoreError`."""
    try:
        yield
    except SimskipError:
        raise
    except BaseException as error:
        # A panic derives from BaseException, and its class has no name that can be imported.
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise StoreError(f"{uri}: {doing}: {error}{_advice(error)}") from error
        raise


def load_shard(path: Path, uri: str) -> edge.EdgeShard:
    """Open a shard; nobody else may hold it open.

    Raises:
        StoreNotFoundError: There is no such folder.
        UnsupportedIndexError: It is no shard, or one without a write-ahead log.
        StoreError: It is damaged, or held open.
    """
    if not path.exists():
        raise nothing_at(path, uri)
    if not path.is_dir():
        raise UnsupportedIndexError(
            f"{uri}: a file, not the folder of a shard; unpack a server's snapshot first with "
            "qdrant_edge.EdgeShard.unpack_snapshot(FILE, FOLDER), and give the folder"
        )
    # The engine makes a shard out of whatever folder it is given.
    segments = path / "segments"
    if not segments.is_dir() or not any(segments.iterdir()):
        raise UnsupportedIndexError(
            f"{uri}: not the folder of a Qdrant Edge shard, which holds 'segments' and "
            f"'{_CONFIG}'; give the folder that EdgeShard.create was given"
        )
    if (path / _CONFIG).is_file() and read_config(path, uri).get("wal_enabled") is False:
        raise UnsupportedIndexError(
            f"{uri}: made without a write-ahead log, so the engine does not notice that another "
            "process holds it open, and a kill loses writes; copy its points to a shard with "
            "wal_enabled=True"
        )
    with engine_call(uri, "the shard cannot be opened"):
        return edge.EdgeShard.load(str(path))


def read_config(path: Path, uri: str) -> dict[str, Any]:
    """Return what the shard's configuration file says.

    Raises:
        StoreError: It cannot be read.
    """
    file = path / _CONFIG
    with disk_errors(file):
        text = file.read_bytes()
    try:
        config = json_of(text)
    except ValueError as error:
        raise StoreError(f"{uri}: {file} is damaged: {error}") from None
    if not isinstance(config, dict):
        raise StoreError(f"{uri}: {file} is damaged: it holds no JSON object")
    return config


def settings_of(config: Mapping[str, Any], vector: str, uri: str) -> VectorSettings:
    """Return the settings of one vector.

    Raises:
        UnsupportedIndexError: It cannot be refined.
    """
    found = config["vectors"][vector]
    rounding = rounding_of(found.get("datatype"), uri)
    metric = metric_of(found["distance"], uri)
    graph = {**_HNSW, **(config.get("hnsw_config") or {}), **(found.get("hnsw_config") or {})}
    codes = found.get("quantization_config") or config.get("quantization_config") or {}
    return VectorSettings(
        dim=found["size"],
        metric=metric,
        distance=getattr(edge.Distance, found["distance"]),
        datatype=_DATATYPES[found.get("datatype")],
        rounding=rounding,
        hnsw={name: graph[name] for name in _HNSW},
        quantization=next(iter(codes), None),
        multi=_MAX_SIM if found.get("multivector_config") else None,  # there is no other yet
    )


def _advice(error: BaseException) -> str:
    if "WouldBlock" not in str(error):
        return ""
    return (
        ". Another handle holds the shard open, and there can be one at a time: close the "
        "application that uses it (EdgeShard.close()), then run the same command"
    )
