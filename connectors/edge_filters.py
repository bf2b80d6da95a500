"""Qdrant's filters, from their JSON to the classes of Qdrant Edge."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import qdrant_edge as edge

from simskip_vdb.errors import ConfigError

Json = Mapping[str, Any]


def _is(value: Any) -> edge.MatchValue:  # noqa: ANN401 a number, text or boolean
    # The engine takes Python's booleans for the numbers 1 and 0, which match no boolean.
    found: Any = np.bool_(value) if isinstance(value, bool) else value
    return edge.MatchValue(found)


_MATCHES: Mapping[str, Callable[[Any], Any]] = {
    "value": _is,
    "any": edge.MatchAny,
    "except": edge.MatchExcept,
    "text": edge.MatchText,
    "text_any": edge.MatchTextAny,
    "phrase": edge.MatchPhrase,
}


def to_filter(found: Json | None, uri: str) -> edge.Filter | None:
    """Return a filter as Qdrant Edge takes it; None for None.

    Raises:
        ConfigError: It holds what Qdrant's filters do not have.
    """
    if found is None:
        return None
    try:
        return _filter(found)
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        raise ConfigError(
            f"{uri}: the filter {dict(found)} cannot be read: {error}; it is written as in "
            'Qdrant\'s REST interface, such as {"must": [{"key": "lang", "match": '
            '{"value": "en"}}]}'
        ) from None


def both(*filters: edge.Filter | None) -> edge.Filter:
    """Return what all of these filters let through."""
    return edge.Filter(must=[each for each in filters if each is not None])


def has_vector(name: str) -> edge.Filter:
    """Return what lets through points that have this vector."""
    return edge.Filter(must=[edge.HasVectorCondition(name)])


def has_value(field: str) -> edge.Filter:
    """Return what lets through points with a value in a payload field."""
    return edge.Filter(must_not=[edge.IsEmptyCondition(field)])


def unchanged(field: str, values: Mapping[int | str, Any]) -> edge.Filter:
    """Return what lets through points whose payload field still has this value.

    Args:
        field: The payload field.
        values: A number, text, boolean or None for each point.
    """
    points: dict[tuple[type, Any], set[Any]] = {}
    for point, value in values.items():
        points.setdefault((type(value), value), set()).add(point)
    conditions: list[Any] = [
        edge.Filter(must=[edge.HasIdCondition(each), _equals(field, value)])
        for (_, value), each in points.items()
    ]
    return edge.Filter(should=conditions)


def _equals(field: str, value: Any) -> Any:  # noqa: ANN401 any of the engine's conditions
    if value is None:
        return edge.IsEmptyCondition(field)
    if isinstance(value, float):
        return edge.FieldCondition(field, range=edge.RangeFloat(gte=value, lte=value))
    return edge.FieldCondition(field, match=_is(value))


def _filter(found: Json) -> edge.Filter:
    _refuse_others(found, ("must", "should", "must_not", "min_should"))
    least = found.get("min_should")
    return edge.Filter(
        **{name: _conditions(found.get(name)) for name in ("must", "should", "must_not")},
        min_should=least
        and edge.MinShould(_conditions(least["conditions"]) or [], least["min_count"]),
    )


def _conditions(found: Json | Iterable[Json] | None) -> list[Any] | None:
    if found is None:
        return None
    return [_condition(each) for each in ([found] if isinstance(found, Mapping) else found)]


def _condition(found: Json) -> Any:  # noqa: ANN401 any of the engine's conditions
    if "key" in found:
        return _field(found)
    if len(found) == 1:
        ((name, value),) = found.items()
        if name == "has_id":
            return edge.HasIdCondition(set(value))
        if name == "has_vector":
            return edge.HasVectorCondition(value)
        if name == "is_empty":
            return edge.IsEmptyCondition(value["key"])
        if name == "is_null":
            return edge.IsNullCondition(value["key"])
        if name == "nested":
            return edge.NestedCondition(value["key"], _filter(value["filter"]))
    return _filter(found)


def _field(found: Json) -> edge.FieldCondition:
    kinds: Mapping[str, Callable[[Any], Any]] = {
        "match": _match,
        "range": _range,
        "geo_bounding_box": lambda box: edge.GeoBoundingBox(
            _point(box["top_left"]), _point(box["bottom_right"])
        ),
        "geo_radius": lambda circle: edge.GeoRadius(_point(circle["center"]), circle["radius"]),
        "geo_polygon": lambda shape: edge.GeoPolygon(
            _line(shape["exterior"]), [_line(each) for each in shape.get("interiors") or ()]
        ),
        "values_count": lambda limits: edge.ValuesCount(**limits),
        "is_empty": bool,
        "is_null": bool,
    }
    _refuse_others(found, ("key", *kinds))
    given = {name: make(found[name]) for name, make in kinds.items() if name in found}
    return edge.FieldCondition(found["key"], **given)


def _match(found: Json) -> Any:  # noqa: ANN401 any of the engine's matches
    _refuse_others(found, _MATCHES)
    ((kind, value),) = found.items()
    return _MATCHES[kind](value)


def _range(found: Json) -> edge.RangeFloat | edge.RangeDateTime:
    is_time = any(isinstance(limit, str) for limit in found.values())
    return edge.RangeDateTime(**found) if is_time else edge.RangeFloat(**found)


def _line(found: Json) -> list[edge.GeoPoint]:
    return [_point(each) for each in found["points"]]


def _point(found: Json) -> edge.GeoPoint:
    return edge.GeoPoint(found["lon"], found["lat"])


def _refuse_others(found: Json, known: Iterable[str]) -> None:
    others = sorted(set(found) - set(known))
    if others:
        raise ValueError(f"'{others[0]}' is not among {', '.join(known)}")
