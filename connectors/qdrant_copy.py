"""Making room beside a collection: another vector, a copy, an alias that leads elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from qdrant_client import models

from simskip_vdb.by_vector import near
from simskip_vdb.connectors.qdrant_calls import Calls
from simskip_vdb.connectors.qdrant_layout import Layout, vectors_of
from simskip_vdb.connectors.qdrant_marker import CLAIM
from simskip_vdb.connectors.qdrant_points import F16_ROUNDING, F32_ROUNDING
from simskip_vdb.datatypes import Progress
from simskip_vdb.errors import (
    ConfigError,
    StoreNotFoundError,
    UnsupportedIndexError,
    VerificationError,
)
from simskip_vdb.store import BESIDE

_KEY = "simskip-copy-of"
_BYTES = 16_000_000
_PAYLOAD_BYTES = 8_000
_NUMBER_BYTES = 22
_ROUNDS = 3
_MOST = 64


def copy_collection(
    calls: Calls, source: str, target: str, layout: Layout, progress: Progress
) -> None:
    """Copy a collection, or bring a copy up to date, and compare all but one vector of every point.

    Points of the copy whose payload and other vectors are the same are left as they are; points
    that differ are copied again, and points that are gone are removed.

    Args:
        calls: The client.
        source: The collection.
        target: The name of its copy.
        layout: The vector that the copy is made for; it may already differ where a point is there.
        progress: Hears of points copied and compared.

    Raises:
        ConfigError: There is a collection of that name that is no such copy.
        UnsupportedIndexError: The collection is sharded by keys of its own.
        VerificationError: A point of the copy still is not what the collection holds: it is written
            to all the time.
    """
    found = _describe(calls, source)
    if layout.sharded:
        raise UnsupportedIndexError(
            f"{calls.uri}: the collection is sharded by keys of its own, and a copy would lose "
            "them; write in place, or to a new vector"
        )
    _create(calls, source, target, found)
    size = _page_size(found, layout)
    others = _others(found, layout)
    for _ in range(_ROUNDS):
        _bring_over(calls, source, target, size, others, progress)
        if _difference(calls, source, target, size, others, progress) is None:
            return
    compare(calls, source, target, layout, progress)


def compare(calls: Calls, source: str, target: str, layout: Layout, progress: Progress) -> None:
    """Make sure that a copy holds what the collection holds, but for one vector of every point.

    Raises:
        VerificationError: It does not.
    """
    found = _describe(calls, source)
    size, others = _page_size(found, layout), _others(found, layout)
    different = _difference(calls, source, target, size, others, progress)
    if different is not None:
        raise VerificationError(
            f"{calls.uri}: point {different} of the copy '{target}' is not what '{source}' holds: "
            "one of them was written to. Write to both, or stop writing, and run the same command "
            "again"
        )


def create_vector(calls: Calls, collection: str, name: str, like: models.VectorParams) -> None:
    """Make room for another vector a point, with the settings of one that is there."""
    datatype = None if like.datatype is None else models.VectorStorageDatatype(like.datatype.value)
    dense = models.DenseVectorConfig(
        size=like.size,
        distance=like.distance,
        multivector_config=like.multivector_config,
        datatype=datatype,
    )
    calls(
        "create_vector_name",
        collection_name=collection,
        vector_name=name,
        vector_name_config=models.DenseVectorNameConfig(dense=dense),
    )
    rest = _as(models.VectorParamsDiff, like)
    if rest.model_dump(exclude_none=True):
        calls("update_collection", collection_name=collection, vectors_config={name: rest})


def drop_copy(calls: Calls, source: str, target: str) -> None:
    """Remove a copy of a collection; nothing happens where there is none.

    Raises:
        ConfigError: It is no copy of it, or an alias leads to it.
    """
    if not calls("collection_exists", collection_name=target):
        return
    _check_copy(calls, source, target, _describe(calls, target))
    for alias in calls("get_aliases").aliases:
        if alias.collection_name == target:
            raise ConfigError(
                f"{calls.uri}: the alias '{alias.alias_name}' leads to '{target}'; lead it "
                "elsewhere before the copy is removed"
            )
    calls("delete_collection", collection_name=target)


def switch_alias(calls: Calls, alias: str, target: str) -> None:
    """Lead an alias to a collection, in one request.

    Raises:
        StoreNotFoundError: There is no such collection.
    """
    names = {collection.name for collection in calls("get_collections").collections}
    if target not in names:
        raise StoreNotFoundError(f"{calls.uri}: there is no collection '{target}'")
    operations: list[models.AliasOperations] = [
        models.DeleteAliasOperation(delete_alias=models.DeleteAlias(alias_name=alias)),
        models.CreateAliasOperation(
            create_alias=models.CreateAlias(collection_name=target, alias_name=alias)
        ),
    ]
    calls("update_collection_aliases", change_aliases_operations=operations)


def _create(calls: Calls, source: str, target: str, found: models.CollectionInfo) -> None:
    config, params = found.config, found.config.params
    if calls("collection_exists", collection_name=target):
        there = _describe(calls, target)
        _check_copy(calls, source, target, there)
        if _spaces(there) != _spaces(found):
            raise ConfigError(
                f"{calls.uri}: '{target}' is an old copy with other vectors than '{source}' has "
                "now; remove it"
            )
    else:
        calls(
            "create_collection",
            collection_name=target,
            vectors_config=params.vectors,
            sparse_vectors_config=params.sparse_vectors,
            shard_number=params.shard_number,
            sharding_method=params.sharding_method,
            replication_factor=params.replication_factor,
            write_consistency_factor=params.write_consistency_factor,
            on_disk_payload=params.on_disk_payload,
            payload=params.payload,
            id_tracker=params.id_tracker,
            hnsw_config=_as(models.HnswConfigDiff, config.hnsw_config),
            optimizers_config=_as(models.OptimizersConfigDiff, config.optimizer_config),
            wal_config=_as(models.WalConfigDiff, config.wal_config),
            quantization_config=config.quantization_config,
            strict_mode_config=_as(models.StrictModeConfig, config.strict_mode_config),
            metadata={**(config.metadata or {}), CLAIM: None, _KEY: source},
        )
        fan_out = {
            name: value
            for name in ("read_fan_out_factor", "read_fan_out_delay_ms")
            if (value := getattr(params, name)) is not None
        }
        if fan_out:
            diff = models.CollectionParamsDiff(**fan_out)
            calls("update_collection", collection_name=target, collection_params=diff)
    there = _describe(calls, target)
    for field, index in found.payload_schema.items():
        if field not in there.payload_schema:
            schema = index.params or index.data_type
            calls(
                "create_payload_index",
                collection_name=target,
                field_name=field,
                field_schema=schema,
            )


def _bring_over(
    calls: Calls,
    source: str,
    target: str,
    size: int,
    others: Mapping[str, _Rounded],
    progress: Progress,
) -> None:
    """Copy points that the copy lacks or has otherwise, and remove those that are gone."""
    for records in _unequal(calls, (source, target), size, others, "copy", progress):
        points = [
            models.PointStruct(id=r.id, payload=r.payload or {}, vector=_input(r.vector))
            for r in records
        ]
        calls("upsert", collection_name=target, points=points)
    for gone in _surplus(calls, source, target, size):
        calls("delete", collection_name=target, points_selector=gone)


def _difference(
    calls: Calls,
    source: str,
    target: str,
    size: int,
    others: Mapping[str, _Rounded],
    progress: Progress,
) -> object:
    """Return the id of a point that differs; None where none does."""
    for records in _unequal(calls, (source, target), size, others, "compare", progress):
        return records[0].id
    for gone in _surplus(calls, source, target, size):
        return gone[0]
    return None


def _unequal(
    calls: Calls,
    names: tuple[str, str],
    size: int,
    others: Mapping[str, _Rounded],
    stage: str,
    progress: Progress,
) -> Iterator[list[models.Record]]:
    """Yield points, page by page, that the copy lacks or has otherwise; no page is empty."""
    source, target = names
    done, total = 0, calls("count", collection_name=source).count
    for records in _pages(calls, source, size):
        held = _held(calls, target, records)
        found = [r for r in records if r.id not in held or not _same(r, held[r.id], others)]
        if found:
            yield found
        done += len(records)
        progress(stage, done, total)


def _surplus(calls: Calls, source: str, target: str, size: int) -> Iterator[list[Any]]:
    """Yield ids, page by page, that only the copy has; no page is empty."""
    for records in _pages(calls, target, size, contents=False):
        held = _held(calls, source, records, contents=False)
        gone = [record.id for record in records if record.id not in held]
        if gone:
            yield gone


def _held(
    calls: Calls, collection: str, records: Sequence[models.Record], *, contents: bool = True
) -> dict[Any, models.Record]:
    """Return those of these points that a collection holds, by id."""
    found = calls(
        "retrieve",
        collection_name=collection,
        ids=[record.id for record in records],
        with_payload=contents,
        with_vectors=contents,
    )
    return {record.id: record for record in found}


class _Rounded(NamedTuple):
    """Within what relative distance a vector is read back, and whether only as a direction."""

    rounding: float
    directions: bool


def _others(found: models.CollectionInfo, layout: Layout) -> Mapping[str, _Rounded]:
    """Return how each other dense vector is read back."""
    return {
        name: _Rounded(
            F16_ROUNDING if params.datatype is models.Datatype.FLOAT16 else F32_ROUNDING,
            params.distance is models.Distance.COSINE,
        )
        for name, params in vectors_of(found).items()
        if name != layout.name
    }


def _same(one: models.Record, other: models.Record, others: Mapping[str, _Rounded]) -> bool:
    if (one.payload or {}) != (other.payload or {}):
        return False
    left, right = _by_name(one.vector), _by_name(other.vector)
    if left.keys() != right.keys():
        return False
    if any(left[n] != right[n] for n in left if isinstance(left[n], models.SparseVector)):
        return False
    return all(
        _close(left[name], right[name], others[name]) for name in left.keys() & others.keys()
    )


def _close(one: Any, other: Any, rounded: _Rounded) -> bool:  # noqa: ANN401 lists of numbers
    left, right = np.atleast_2d(np.asarray(one)), np.atleast_2d(np.asarray(other))
    if left.shape != right.shape:
        return False
    return bool(near(right, left, rounded.rounding, directions=rounded.directions).all())


def _pages(
    calls: Calls, collection: str, size: int, *, contents: bool = True
) -> Iterator[Sequence[models.Record]]:
    start = None
    while True:
        records, start = calls(
            "scroll",
            collection_name=collection,
            limit=size,
            offset=start,
            with_payload=contents,
            with_vectors=contents,
        )
        if records:
            yield records
        if start is None:
            return


def _page_size(found: models.CollectionInfo, layout: Layout) -> int:
    numbers = sum(params.size for params in vectors_of(found).values())
    fitting = _BYTES // (numbers * _NUMBER_BYTES + _PAYLOAD_BYTES)
    size = layout.limit("upsert_max_batchsize", max(1, min(_MOST, fitting)))
    return layout.limit("max_query_limit", size)


def _check_copy(calls: Calls, source: str, target: str, there: models.CollectionInfo) -> None:
    copied = str((there.config.metadata or {}).get(_KEY, ""))
    ours = copied == source or copied.startswith(f"{source}{BESIDE}-")  # or a copy of a copy of it
    if target == source or not ours:
        raise ConfigError(
            f"{calls.uri}: '{target}' is not a copy of '{source}' that was made here; choose "
            "another name"
        )


def _describe(calls: Calls, collection: str) -> models.CollectionInfo:
    found: models.CollectionInfo = calls("get_collection", collection_name=collection)
    return found


def _spaces(found: models.CollectionInfo) -> Any:  # noqa: ANN401 anything that compares
    dense = {name: (p.size, p.distance, p.datatype) for name, p in vectors_of(found).items()}
    return dense, sorted(found.config.params.sparse_vectors or {})


def _as(kind: Any, settings: Any) -> Any:  # noqa: ANN401 the client's models
    """Turn settings as they are read into settings as they are written."""
    if settings is None:
        return None
    plain = settings.model_dump(exclude_none=True)
    return kind(**{name: value for name, value in plain.items() if name in kind.model_fields})


def _by_name(vector: Any) -> Mapping[str, Any]:  # noqa: ANN401 the client's unions
    if vector is None:
        return {}
    return vector if isinstance(vector, dict) else {"": vector}


def _input(vector: Any) -> Any:  # noqa: ANN401 the client's unions
    return {} if vector is None else vector
