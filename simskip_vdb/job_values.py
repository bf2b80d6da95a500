"""What may stand in a job file: kinds of values, checked and converted one at a time."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from urllib.parse import unquote

from simskip_vdb.connectors import full_address, known_schemes, scheme_of
from simskip_vdb.connectors.addresses import address_of
from simskip_vdb.qrels_forms import IR_DATASETS
from simskip_vdb.redaction import holds_secret, redacted

Kind = Callable[[object, Path], object]
"""Converts a value, given the folder that relative paths start from, or raises `WrongValue`."""

SECRETS = "secrets come from the environment only, such as QDRANT_API_KEY"
_DAY = 24 * 60
_HOURS = "([0-9]{2}):([0-9]{2})-([0-9]{2}):([0-9]{2})"
_SHOWN = 60


class WrongValue(ValueError):
    """Says what is wrong with a value, as what follows the name of its key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """The hours of the day in which a job may run, in local time; they may span midnight.

    Attributes:
        start: Minutes after midnight, 0 to 1439.
        end: Minutes after midnight, 1 to 1440, not `start`; the window ends before it.
    """

    start: int
    end: int

    def holds(self, now: datetime) -> bool:
        """Tell whether a moment is inside; without a time zone it is local time."""
        local = _local(now)
        minute = local.hour * 60 + local.minute
        if self.start < self.end:
            return self.start <= minute < self.end
        return minute >= self.start or minute < self.end

    def seconds_left(self, now: datetime) -> float:
        """Return how long the window is still open, 0 outside, by the clock that goes on evenly."""
        if not self.holds(now):
            return 0.0
        local = _local(now)
        midnight = local.replace(hour=0, minute=0, second=0, microsecond=0)
        end = midnight + timedelta(minutes=self.end)
        if end <= local:
            end += timedelta(days=1)
        # An hour that comes twice, in autumn, is told apart by its fold.
        return end.replace(fold=local.fold).timestamp() - now.timestamp()


def _local(now: datetime) -> datetime:
    return datetime.fromtimestamp(now.timestamp())


def shown(value: object) -> str:
    """Return a value as a message may show it: short, and without secrets."""
    if not isinstance(value, str | int | float):
        return type_of(value)
    text = redacted(value) if isinstance(value, str) else str(value).lower()
    text = text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"
    return repr(text) if isinstance(value, str) else text


def type_of(value: object) -> str:
    """Return what TOML calls a value."""
    # A boolean is an int to Python, so it comes first.
    names: tuple[tuple[type, str], ...] = (
        (bool, "true or false"),
        (str, "text"),
        (int, "a number"),
        (float, "a number"),
        (list, "a list"),
        (dict, "a table"),
    )
    return next((name for kind, name in names if isinstance(value, kind)), "a date or time")


def text(value: object, base: Path) -> str:
    """Take text that is not empty and holds no secret."""
    found = condition(value, base)
    if holds_secret(found):
        raise WrongValue(f"holds a user, a password or a key (not shown here); {SECRETS}")
    return found


def condition(value: object, base: Path) -> str:
    """Take text that is not empty; what looks like a secret may be the name of a field."""
    if not isinstance(value, str):
        raise WrongValue(f"is {type_of(value)}; give text between quotes")
    if not value.strip():
        raise WrongValue("is empty; give it a value or leave it out")
    if not value.isprintable():
        raise WrongValue("holds a line break or another character that cannot be shown")
    return value


def flag(value: object, base: Path) -> bool:
    """Take true or false."""
    if not isinstance(value, bool):
        raise WrongValue(f"is {shown(value)}; give true or false, without quotes")
    return value


def choice(*allowed: str) -> Kind:
    """Take one of these words."""

    def convert(value: object, base: Path) -> str:
        if value not in allowed:
            raise WrongValue(f"is {shown(value)}; choose {_or(allowed)}")
        return str(value)

    return convert


def number(what: str, holds: Callable[[float], bool]) -> Kind:
    """Take a number for which `holds` is true, described by `what`; whole ones stay whole."""

    def convert(value: object, base: Path) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not holds(value):
            raise WrongValue(f"is {shown(value)}; give {what}")
        return value

    return convert


def whole(low: int, high: int | None = None) -> Kind:
    """Take an integer in a range, its ends included."""

    def convert(value: object, base: Path) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= top:
            raise WrongValue(f"is {shown(value)}; give a whole number {ends}")
        return value

    top = math.inf if high is None else high
    ends = f"from {low} up" if high is None else f"from {low} to {high}"
    return convert


finite = number("a finite number", math.isfinite)
"""Takes any finite number."""


def file(value: object, base: Path) -> Path:
    """Take a path to a file that is there."""
    path = path_to(value, base)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise WrongValue(f"names {path}, which {what}; give a file")
    return path


def judgments(value: object, base: Path) -> Path:
    """Take a path to a file or a folder of judgments that is there, or the name of a data set."""
    if isinstance(value, str) and value.startswith(IR_DATASETS):
        return Path(value)
    path = path_to(value, base)
    return path if path.is_dir() else file(value, base)


def folder(value: object, base: Path) -> Path:
    """Take a path to a folder that is there."""
    path = path_to(value, base)
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise WrongValue(f"names {path}, which {what}; create the folder, or correct the path")
    return path


def new_folder(value: object, base: Path) -> Path:
    """Take a path to a folder that is there or can be made."""
    path = path_to(value, base)
    if path.exists() and not path.is_dir():
        raise WrongValue(f"names {path}, which is a file; give a folder")
    return path


def new_file(value: object, base: Path) -> Path:
    """Take a path to a file that is there or can be made in its folder."""
    path = path_to(value, base)
    if path.is_dir():
        raise WrongValue(f"names {path}, which is a folder; give a file in it")
    if not path.parent.is_dir():
        raise WrongValue(f"names {path}, but there is no folder {path.parent}; create it first")
    return path


def path_to(value: object, base: Path) -> Path:
    """Take a path, which is relative to `base`, or to your home where it begins with ``~``."""
    given = Path(text(value, base))
    try:
        path = base / given.expanduser()
        path.exists()
    except (OSError, RuntimeError) as error:
        why = getattr(error, "strerror", None) or error
        raise WrongValue(f"is {shown(value)}, and cannot be looked at: {why}") from None
    return path


def address(value: object, base: Path) -> str:
    """Take the URI of an index; paths in it become absolute, and plain ones get a scheme."""
    uri = full_address(text(value, base), base)
    scheme = scheme_of(uri, base)
    if scheme not in known_schemes():
        raise WrongValue(
            f"has the unknown scheme '{scheme}:'; known: {', '.join(known_schemes())}. "
            "A path that holds a colon is written with ./ in front"
        )
    if scheme == "faiss":
        return f"faiss:{path_to(uri.removeprefix('faiss:'), base)}"
    if scheme not in ("parquet", "npy", "npz", "safetensors", "qdrant-edge", "qdrant-local"):
        return uri
    place, mark, options = uri.partition(":")[2].partition("?")
    return address_of(scheme, str(path_to(unquote(place), base)), {}) + mark + options


def originals(value: object, base: Path) -> str:
    """Take exact vectors: a ``.npy`` file that is there, or the URI of an index."""
    if isinstance(value, str) and value.endswith(".npy"):
        return str(file(value, base))
    return address(value, base)


def window(value: object, base: Path) -> Window:
    """Take ``HH:MM-HH:MM``."""
    found = re.fullmatch(_HOURS, value if isinstance(value, str) else "")
    if found is None:
        raise WrongValue(f"is {shown(value)}; write HH:MM-HH:MM, such as 22:00-05:30, local time")
    hours = [int(part) for part in found.groups()]
    start, end = hours[0] * 60 + hours[1], hours[2] * 60 + hours[3]
    if max(hours[1], hours[3]) > 59 or start >= _DAY or end > _DAY:
        raise WrongValue(f"is {shown(value)}; hours go from 00:00 to 24:00")
    end = end or _DAY
    if start == end or (start, end) == (0, _DAY):
        raise WrongValue(f"is {shown(value)}; leave it out where any time will do")
    return Window(start=start, end=end)


def measure(value: object, base: Path) -> str:
    """Take a measure by its ir-measures name."""
    from simskip_vdb.evaluation import parse_measures

    name = text(value, base)
    try:
        return parse_measures([name])[0]
    except ValueError as error:
        raise WrongValue(str(error).removeprefix("measure ")) from None


def _or(words: tuple[str, ...]) -> str:
    return " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))
