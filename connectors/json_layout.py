"""Where vectors stand in the text of a JSON file, and how they are read and written there."""

from __future__ import annotations

import hashlib
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from simskip_vdb.connectors.digits import Digits, Numbers, as_float32
from simskip_vdb.connectors.row_file import LayOver
from simskip_vdb.datatypes import Ids, Positions, id_text
from simskip_vdb.durable import json_of
from simskip_vdb.errors import DataError, SimskipError, StoreError

_TEXT = rb'"((?:[^"\\]|\\.)*)"'
_OPEN = re.compile(rb"\s*\{")
_CLOSE = re.compile(rb"\s*\}")
_NEXT = re.compile(rb"\s*([,}])")
_KEY = re.compile(rb"\s*" + _TEXT + rb"\s*:")
_ROW = re.compile(rb"\s*" + _TEXT + rb"\s*:\s*\[([-+.0-9eEINafinty,\s]*)\]\s*([,}])")
_TOKEN = re.compile(rb"\s*(?:" + _TEXT + rb"|([\[{])|([\]}])|[,:]|[-+.\w]+)")
_STYLE = re.compile(rb"(\s*)[^,\s]+(?:(\s*,\s*)[^,\s]+)?.*?(\s*)$", re.DOTALL)
_AT_ONCE = 1 << 22
_LONGEST = 1 << 26


class Span(NamedTuple):
    """Where something stands, in bytes: from `start` up to `stop`."""

    start: int
    stop: int


class JsonLayout:
    """An object of JSON that holds a vector by id, one of the values of the outermost object.

    Attributes:
        ids: Keys, in the order of the file, shape (n,).
        dim: Numbers of a vector.
    """

    def __init__(self, path: Path, key: str) -> None:
        """Find the vectors.

        Raises:
            StoreError: There is no such object, or it is damaged.
            DataError: A vector has other numbers than the first, or something that is none.
        """
        self._path = path
        with path.open("rb") as file:
            text = _Reader(file, path)
            text.expect(_OPEN, "an object")
            while text.expect(_KEY, "a key")[1] != key.encode():
                text.skip()
                if text.expect(_NEXT, "a comma or a brace")[1] == b"}":
                    raise StoreError(f"{path}: there is no '{key}' in it, so it holds no vectors")
            text.expect(_OPEN, "an object of vectors")
            begin = text.at - 1
            self._read_rows(text)
            self._object = Span(begin, text.at)

    def _read_rows(self, text: _Reader) -> None:
        names, starts, stops, commas = [], [], [], []
        last = text.match(_CLOSE) is not None
        while not last:
            row = text.match(_ROW)
            if row is None:
                raise text.wrong_row()
            names.append(row[1] if b"\\" not in row[1] else json_of(b'"%b"' % row[1]).encode())
            starts.append(text.base + row.start(2))
            stops.append(text.base + row.end(2))
            commas.append(row[2].count(b",") if row[2].strip() else -1)
            last = row[3] == b"}"
            if len(names) == 1:
                self._style = _STYLE.match(row[2])
        self.ids: Ids = id_text(names)
        self._starts, self._stops = np.array(starts, np.int64), np.array(stops, np.int64)
        sizes = np.array(commas, np.int64) + 1
        self.dim = int(sizes[0]) if len(sizes) else 0
        odd = np.flatnonzero(sizes != self.dim)
        if len(odd):
            raise DataError(
                f"{self._path}: the vector of '{names[odd[0]].decode()}' has {sizes[odd[0]]} "
                f"numbers, and that of '{names[0].decode()}' {self.dim}; keep rows of one encoder"
            )

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, start: int, stop: int) -> Numbers:
        """Return some successive rows, shape (stop - start, d), float64."""
        with self._path.open("rb") as file:
            return self._numbers(self._texts(file, start, stop))

    def take(self, positions: Positions) -> Numbers:
        """Return the rows at some positions, shape (len(positions), d), float64."""
        with self._path.open("rb") as file:
            return self._numbers([self._texts(file, at, at + 1)[0] for at in positions.tolist()])

    def rewrite(self, target: Path, lay_over: LayOver, digits: Digits) -> None:
        """Write the file anew with other vectors; everything else stays as it is."""
        with self._path.open("rb") as file, target.open("wb") as new:
            at = 0
            for start, stop in self._blocks():
                texts = self._texts(file, start, stop)
                found = self._numbers(texts)
                before = as_float32(found)
                vectors = before.copy()
                lay_over(start, vectors)
                changed = np.flatnonzero(
                    (vectors.view(np.uint32) != before.view(np.uint32)).any(axis=1)
                )
                after = digits.written(self.ids[start:stop], found, vectors, changed)
                for row in changed.tolist():
                    texts[row] = self._written(after[row])
                for gap, text in zip(self._gaps(file, at, start, stop), texts, strict=True):
                    new.write(gap)
                    new.write(text)
                at = int(self._stops[stop - 1])
            file.seek(at)
            shutil.copyfileobj(file, new, _AT_ONCE)

    def around(self) -> str:
        """Hash everything but the numbers, 64 hex digits."""
        found, at = hashlib.sha256(), 0
        with self._path.open("rb") as file:
            for start, stop in self._blocks():
                for gap in self._gaps(file, at, start, stop):
                    found.update(b"%d\0%b" % (len(gap), gap))
                at = int(self._stops[stop - 1])
            file.seek(at)
            while block := file.read(_AT_ONCE):
                found.update(block)
        return found.hexdigest()

    def rest(self) -> Any:  # noqa: ANN401 whatever it holds
        """Return what the file holds when the vectors are left out.

        Raises:
            StoreError: It is damaged.
        """
        begin, end = self._object
        with self._path.open("rb") as file:
            head = file.read(begin)
            file.seek(end)
            try:
                return json_of(head + b"{}" + file.read())
            except ValueError as error:
                raise StoreError(f"{self._path} is damaged ({error}); restore it") from None

    def _blocks(self) -> Iterator[Span]:
        """Yield which rows to take at once."""
        step = max(1, _AT_ONCE // max(1, 32 * self.dim))
        for start in range(0, len(self), step):
            yield Span(start, min(start + step, len(self)))

    def _texts(self, file: IO[bytes], start: int, stop: int) -> list[bytes]:
        if start >= stop:
            return []
        base = int(self._starts[start])
        file.seek(base)
        data = file.read(int(self._stops[stop - 1]) - base)
        begins, ends = self._starts[start:stop] - base, self._stops[start:stop] - base
        return [data[a:b] for a, b in zip(begins.tolist(), ends.tolist(), strict=True)]

    def _gaps(self, file: IO[bytes], at: int, start: int, stop: int) -> Iterator[bytes]:
        """Yield what stands before each of some rows, from `at` on."""
        file.seek(at)
        data = file.read(int(self._starts[stop - 1]) - at)
        for begin, end in zip(
            [at, *self._stops[start : stop - 1].tolist()],
            self._starts[start:stop].tolist(),
            strict=True,
        ):
            yield data[begin - at : end - at]

    def _numbers(self, texts: list[bytes]) -> Numbers:
        with warnings.catch_warnings():
            warnings.simplefilter("error", DeprecationWarning)
            try:
                found: NDArray[np.float64] = np.fromstring(b",".join(texts), np.float64, sep=",")
                return found.reshape(len(texts), self.dim)
            except (ValueError, DeprecationWarning):
                raise StoreError(
                    f"{self._path}: a vector holds something that is no number, or the file "
                    "changed while it was read; restore it from a backup"
                ) from None

    def _written(self, row: NDArray[np.float64]) -> bytes:
        assert self._style is not None
        before, between, after = self._style.groups()
        return b"%b%b%b" % (before, (between or b"").join(map(_shown, row.tolist())), after)


def _shown(number: float) -> bytes:
    return repr(number).encode()


class _Reader:
    """Reads on only as far as what is looked for may reach.

    Attributes:
        base: Where the text of the last match begins, in bytes from the beginning of the file.
    """

    def __init__(self, file: IO[bytes], path: Path) -> None:
        self._file, self._path = file, path
        self._text, self._from, self._ended = b"", 0, False
        self.base = 0

    @property
    def at(self) -> int:
        """Where reading goes on, in bytes."""
        return self.base + self._from

    def match(self, pattern: re.Pattern[bytes]) -> re.Match[bytes] | None:
        """Match what comes next; None, and no step, where it does not."""
        while True:
            found = pattern.match(self._text, self._from)
            whole = self._ended or (found is not None and found.end() < len(self._text))
            if found is not None and whole:
                self._from = found.end()
                return found
            if whole or len(self._text) - self._from > _LONGEST:
                return None
            more = self._file.read(max(_AT_ONCE, len(self._text) - self._from))
            self._ended = not more
            self.base += self._from
            self._text, self._from = self._text[self._from :] + more, 0

    def expect(self, pattern: re.Pattern[bytes], what: str) -> re.Match[bytes]:
        """Match what must come next.

        Raises:
            StoreError: It does not.
        """
        found = self.match(pattern)
        if found is None:
            raise StoreError(
                f"{self._path} is damaged: {what} should stand at byte {self.at:,}; restore it "
                "from a backup"
            )
        return found

    def skip(self) -> None:
        """Pass over a value."""
        depth = 0
        while True:
            token = self.expect(_TOKEN, "a value")
            depth += (token[2] is not None) - (token[3] is not None)
            if depth <= 0:
                return

    def wrong_row(self) -> SimskipError:
        """Return what to say of a row that is no vector."""
        key = self.match(_KEY)
        if key is None:
            return StoreError(f"{self._path} is cut off or damaged at byte {self.at:,}; restore it")
        name = key[1].decode(errors="replace")
        return DataError(
            f"{self._path}: what stands for '{name}' is no list of numbers, or is cut off; remove "
            "it, or restore the file from a backup"
        )
