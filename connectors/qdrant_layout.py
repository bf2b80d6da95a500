"""What a Qdrant collection says of one of its vectors, and of what may be asked of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qdrant_client import models

from simskip_vdb.connectors.multi_rows import KIND
from simskip_vdb.connectors.qdrant_points import choose_vector, metric_of, rounding_of
from simskip_vdb.datatypes import Metric
from simskip_vdb.errors import ConfigError

Version = tuple[int, int]
"""Major and minor."""
ANY_VERSION: Version = (999, 0)
"""The version of local mode, which has whatever the client has."""

_REQUEST_BYTES = 24_000_000
_NUMBER_BYTES = 22
_POINT_BYTES = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """One dense vector of a collection.

    Attributes:
        name: Its name; empty for the unnamed one.
        params: Its settings.
        metric: How queries and rows are compared.
        rounding: Relative L2 distance within which it is read back.
        exact: True where it is read back bit for bit.
        strict: Limits of strict mode that are in force, by name.
        wait: True where a write is answered when it is applied.
        sharded: True where a write must say to which shard it goes.
    """

    name: str
    params: models.VectorParams
    metric: Metric
    rounding: float
    exact: bool
    strict: Mapping[str, Any]
    wait: bool
    sharded: bool

    @property
    def dim(self) -> int:
        """Dimension of a vector."""
        return self.params.size

    @property
    def multi(self) -> bool:
        """True where each point has several vectors."""
        return self.params.multivector_config is not None

    def limit(self, name: str, most: int) -> int:
        """Return `most`, or strict mode's limit of that name where it is lower."""
        allowed = self.strict.get(name)
        return most if allowed is None else max(1, min(most, int(allowed)))

    def write_size(self, most: int) -> int:
        """Return how many points go into one request that writes."""
        fitting = _REQUEST_BYTES // (self.dim * _NUMBER_BYTES + _POINT_BYTES)
        return self.limit("upsert_max_batchsize", max(1, min(most, fitting)))


def vectors_of(info: models.CollectionInfo) -> dict[str, models.VectorParams]:
    """Return the dense vectors of a collection by name; the unnamed one's is empty."""
    found = info.config.params.vectors
    return {"": found} if isinstance(found, models.VectorParams) else dict(found or {})


def layout_of(info: models.CollectionInfo, wanted: str | None, uri: str) -> Layout:
    """Choose a vector of a collection and check that it can be refined.

    Raises:
        ConfigError: There is no such vector, or there are several and none was named.
        UnsupportedIndexError: It cannot be refined.
    """
    vectors = vectors_of(info)
    name = choose_vector(vectors, wanted, uri)
    params = vectors[name]
    metric = metric_of(params.distance.value, uri)
    datatype = params.datatype.value if params.datatype else None
    rounding = rounding_of(datatype, uri)
    strict = info.config.strict_mode_config
    return Layout(
        name=name,
        params=params,
        metric=metric,
        rounding=rounding,
        exact=datatype in (None, "float32") and metric is not Metric.COSINE,
        strict=strict.model_dump(exclude_none=True) if strict and strict.enabled else {},
        wait=not info.config.optimizer_config.prevent_unoptimized,
        sharded=info.config.params.sharding_method is models.ShardingMethod.CUSTOM,
    )


def kind_of(layout: Layout, info: models.CollectionInfo, *, local: bool) -> str:
    """Return what searches the vector, in a person's words."""
    quantised = layout.params.quantization_config or info.config.quantization_config
    if local:
        kind = "exact, Qdrant's local mode"
    elif quantised is None:
        kind = "HNSW"
    else:
        name = type(quantised).__name__.removesuffix("Quantization").lower()
        kind = f"HNSW, {name} quantization"
    return f"{kind}, {KIND}" if layout.multi else kind


def details_of(layout: Layout, info: models.CollectionInfo, version: str) -> dict[str, Any]:
    """Return what is worth showing, by Qdrant's own names; an empty version is local mode."""
    config, params = info.config, layout.params
    hnsw = _plain(config.hnsw_config) | _plain(params.hnsw_config)
    optimizer = info.optimizer_status
    if not version:
        return {"version": "local mode", "points": info.points_count}
    found = {
        "version": version,
        "points": info.points_count,
        "segments": info.segments_count,
        "indexed_vectors": info.indexed_vectors_count,
        "status": info.status.value,
        "optimizer_status": optimizer.value
        if isinstance(optimizer, models.OptimizersStatusOneOf)
        else optimizer.error,
        "update_queue": info.update_queue.length if info.update_queue else None,
        "datatype": params.datatype.value if params.datatype else "float32",
        "on_disk": params.on_disk,
        "hnsw_config": {name: hnsw.get(name) for name in ("m", "ef_construct", "on_disk")},
        "quantization_config": _plain(params.quantization_config or config.quantization_config),
        "strict_mode_config": dict(layout.strict),
    }
    return {name: value for name, value in found.items() if value not in (None, {})}


def parse_version(text: str) -> Version:
    """Return major and minor of ``1.19.2-dev``; (0, 0) where it is no version."""
    match = re.match(r"(\d+)\.(\d+)", text)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def need_version(found: Version, needed: Version, what: str, uri: str) -> None:
    """Refuse a server that is too old.

    Raises:
        ConfigError: It is.
    """
    if found < needed:
        raise ConfigError(
            f"{uri}: {what} needs Qdrant {needed[0]}.{needed[1]} or later, and this server is "
            f"{found[0]}.{found[1]}"
        )


def _plain(settings: Any) -> dict[str, Any]:  # noqa: ANN401 any of the client's models
    plain: dict[str, Any] = (
        {} if settings is None else settings.model_dump(mode="json", exclude_none=True)
    )
    return plain
