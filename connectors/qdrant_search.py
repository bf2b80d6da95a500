"""Searching through Qdrant's index."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pydantic import ValidationError
from qdrant_client import models

from simskip_vdb.connectors.qdrant_layout import Layout
from simskip_vdb.connectors.qdrant_points import to_ids
from simskip_vdb.datatypes import ID_TEXT, Metric, Neighbors
from simskip_vdb.errors import ConfigError

_QUANTIZATION = frozenset(models.QuantizationSearchParams.model_fields)
_KNOWN = {"hnsw_ef", "exact", "indexed_only", "quantization", "acorn", *_QUANTIZATION}


def parse_params(
    params: Mapping[str, Any], layout: Layout, k: int, uri: str
) -> models.SearchParams:
    """Return search-time settings as Qdrant takes them.

    Args:
        params: ``hnsw_ef``, ``exact``, ``indexed_only``, ``acorn``, and those of ``quantization``
            (``ignore``, ``rescore``, ``oversampling``), which may also be given by themselves.
        layout: The vector that is searched.
        k: Rows wanted.
        uri: The store, for messages.

    Raises:
        ConfigError: A setting is unknown, or strict mode forbids it.
    """
    unknown = sorted(set(params) - _KNOWN)
    if unknown:
        raise ConfigError(
            f"{uri}: search knows no parameter {', '.join(unknown)}; known: "
            f"{', '.join(sorted(_KNOWN))}"
        )
    plain = {name: value for name, value in params.items() if name not in _QUANTIZATION}
    loose = {name: value for name, value in params.items() if name in _QUANTIZATION}
    if loose:
        plain["quantization"] = {**plain.get("quantization", {}), **loose}
    try:
        found = models.SearchParams.model_validate(plain)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{uri}: search parameter {where}: {first['msg']}") from None
    _within_strict_mode(found, layout, k, uri)
    return found


def to_neighbors(answers: Sequence[models.QueryResponse], k: int, metric: Metric) -> Neighbors:
    """Return answers as arrays; a Euclidean distance becomes minus its square."""
    ids = np.full((len(answers), k), b"", ID_TEXT)
    scores = np.full((len(answers), k), -np.inf)
    for row, answer in enumerate(answers):
        ids[row, : len(answer.points)] = to_ids(point.id for point in answer.points)
        scores[row, : len(answer.points)] = [point.score for point in answer.points]
    if metric is Metric.EUCLID:
        scores = -(scores**2)
    return Neighbors(ids=ids, scores=scores.astype(np.float32))


def _within_strict_mode(params: models.SearchParams, layout: Layout, k: int, uri: str) -> None:
    strict = layout.strict
    oversampling = params.quantization.oversampling if params.quantization else None
    asked = {
        "search_max_hnsw_ef": params.hnsw_ef,
        "search_max_oversampling": oversampling,
        "max_query_limit": k,
    }
    for name, value in asked.items():
        most = strict.get(name)
        if value is not None and most is not None and value > most:
            raise ConfigError(f"{uri}: strict mode allows {name} {most}, not {value}")
    if params.exact and strict.get("search_allow_exact") is False:
        raise ConfigError(f"{uri}: strict mode forbids exact search (search_allow_exact)")
