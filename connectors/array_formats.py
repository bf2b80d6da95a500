"""Files of arrays, ``.npy``, ``.npz`` and ``.safetensors``: what they hold, and how to copy it."""

from __future__ import annotations

import os
import shutil
import struct
import tempfile
import tokenize
import weakref
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from simskip_vdb.connectors.array_layout import File, Layout
from simskip_vdb.durable import free_bytes, json_of
from simskip_vdb.errors import ConfigError, SimskipError, StoreError, UnsupportedIndexError, listed

Overwrite = Callable[[File, int | None], None]
"""Writes new numbers into a file where an array begins, in bytes; None where it always did."""
_NUMPY = b"\x93NUMPY"
_DTYPES = {
    "F16": "<f2",
    "F32": "<f4",
    "F64": "<f8",
    "BF16": "<u2",
    **{f"I{8 * size}": f"<i{size}" for size in (1, 2, 4, 8)},
    **{f"U{8 * size}": f"<u{size}" for size in (1, 2, 4, 8)},
}
_MOST_HEADER = 100_000_000
_COPIED = 1 << 20
_NO_HEADER = (
    *(ValueError, KeyError, EOFError, TypeError, SyntaxError, tokenize.TokenError),
    *(OverflowError, RecursionError, MemoryError),
)
_DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError)


class ArrayFormat(Protocol):
    """An open file of arrays."""

    @property
    def file(self) -> File:
        """What `Layout` reads: the file, or a copy of what is compressed in it."""
        ...

    def layout(self, key: str | None) -> tuple[str | None, Layout]:
        """Find the vectors; without a key, the only array of vectors that there is.

        Raises:
            ConfigError: There is no such array, or several may be meant.
            UnsupportedIndexError: It holds no vectors.
            StoreError: The file is damaged.
        """
        ...

    def array(self, key: str) -> NDArray[Any] | None:
        """Return another array in memory; None where there is none of that name."""
        ...

    def copy(self, target: Path, overwrite: Overwrite) -> None:
        """Write the file anew, with other numbers."""
        ...

    def rest(self) -> Any:  # noqa: ANN401 whatever can be compared
        """Return what tells everything but the vectors, to compare it."""
        ...


class _Plain:
    """A file whose numbers stand in it as they are."""

    def __init__(self, path: Path, uri: str) -> None:
        self.file: Path = path
        self._uri = uri

    def copy(self, target: Path, overwrite: Overwrite) -> None:
        """See `ArrayFormat.copy`."""
        shutil.copyfile(self.file, target)
        overwrite(target, None)


class Npy(_Plain):
    """A ``.npy`` file: one array."""

    def layout(self, key: str | None) -> tuple[str | None, Layout]:
        """See `ArrayFormat.layout`; there are no names."""
        with open(self.file, "rb") as file:
            found = _npy_layout(file, self._uri)
        _check_size(self.file.stat().st_size, found, self._uri)
        return None, found

    def array(self, key: str) -> None:
        """See `ArrayFormat.array`: there is only one."""

    def rest(self) -> object:
        """See `ArrayFormat.rest`."""
        _, found = self.layout(None)
        return _around(self.file, found)


class SafeTensors(_Plain):
    """A ``.safetensors`` file: a header in JSON, and arrays by name."""

    def __init__(self, path: Path, uri: str) -> None:
        super().__init__(path, uri)
        with open(path, "rb") as file:
            head = file.read(8)
            size = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
            if not 2 <= size <= min(_MOST_HEADER, path.stat().st_size - 8):
                raise StoreError(f"{uri}: it is no safetensors file, or damaged")
            text = file.read(size)
        self._start = 8 + size
        try:
            told = json_of(text)
            self._arrays: dict[str, Mapping[str, Any]] = {
                name: value for name, value in told.items() if name != "__metadata__"
            }
            self._layouts = {name: self._layout(value) for name, value in self._arrays.items()}
            end = max((value["data_offsets"][1] for value in self._arrays.values()), default=0)
            if self._start + end > path.stat().st_size:
                raise ValueError(f"it promises {end:,} bytes, and there are fewer")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StoreError(f"{uri}: it is damaged ({error}); restore it from a backup") from None

    def layout(self, key: str | None) -> tuple[str, Layout]:
        """See `ArrayFormat.layout`."""
        shapes = {name: self._shown(name) for name in self._arrays}
        vectors = [name for name, found in self._layouts.items() if found is not None]
        name = _chosen(key, vectors, shapes, self._uri)
        found = self._layouts[name]
        if found is None:
            raise _no_vectors(self._uri, name, shapes[name])
        _check_size(self.file.stat().st_size, found, self._uri)
        return name, found

    def array(self, key: str) -> NDArray[Any] | None:
        """See `ArrayFormat.array`."""
        value = self._arrays.get(key)
        if value is None:
            return None
        dtype = np.dtype(_DTYPES.get(value["dtype"], "V1"))
        count = int(np.prod(value["shape"], dtype=np.int64))
        with open(self.file, "rb") as file:
            file.seek(self._start + value["data_offsets"][0])
            found: NDArray[Any] = np.frombuffer(file.read(count * dtype.itemsize), dtype)
        return np.reshape(found, value["shape"])

    def rest(self) -> object:
        """See `ArrayFormat.rest`."""
        with open(self.file, "rb") as file:
            return file.read(self._start), self.file.stat().st_size

    def _layout(self, value: Mapping[str, Any]) -> Layout | None:
        dtype, shape, (start, stop) = value["dtype"], value["shape"], value["data_offsets"]
        if len(shape) != 2 or dtype not in ("F16", "F32", "F64", "BF16"):
            return None
        brain = dtype == "BF16"
        found = Layout(self._start + start, np.dtype(_DTYPES[dtype]), tuple(shape), brain=brain)
        if not 0 <= start <= stop or stop - start != found.nbytes:
            raise ValueError(f"{shape} numbers of {dtype} are not {stop - start} bytes")
        return found

    def _shown(self, name: str) -> str:
        return f"{self._arrays[name]['dtype']} {tuple(self._arrays[name]['shape'])}"


class Npz:
    """A ``.npz`` archive: ``.npy`` files by name, compressed or not."""

    def __init__(self, path: Path, uri: str) -> None:
        self._path, self._uri = path, uri
        self.file: File = path
        self._chosen: zipfile.ZipInfo | None = None
        try:
            with zipfile.ZipFile(path) as archive:
                self._members = archive.infolist()
                self._comment = archive.comment
                damaged = next((m for m in self._members if m.flag_bits & 1), None)
        except zipfile.BadZipFile:
            raise StoreError(f"{uri}: it is no .npz archive, or damaged") from None
        if damaged is not None:
            raise UnsupportedIndexError(f"{uri}: '{damaged.filename}' is encrypted; write it plain")

    def layout(self, key: str | None) -> tuple[str, Layout]:
        """See `ArrayFormat.layout`."""
        shapes, vectors = {}, []
        members = {m.filename.removesuffix(".npy"): m for m in self._members}
        for name, member in members.items():
            try:
                with self._opened(member) as file:
                    _npy_layout(file, self._uri)
                vectors.append(name)
                shapes[name] = "vectors"
            except SimskipError as error:
                shapes[name] = str(error).removeprefix(f"{self._uri}: ")
        name = _chosen(key, vectors, shapes, self._uri)
        if name not in vectors:
            raise _no_vectors(self._uri, name, shapes[name])
        self._chosen = members[name]
        return name, self._find(self._chosen)

    def array(self, key: str) -> NDArray[Any] | None:
        """See `ArrayFormat.array`."""
        names = {m.filename.removesuffix(".npy"): m for m in self._members}
        if key not in names:
            return None
        with self._opened(names[key]) as file:
            try:
                found: NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False)
            except ValueError as error:
                raise UnsupportedIndexError(f"{self._uri}: '{key}': {error}") from None
        return found

    def copy(self, target: Path, overwrite: Overwrite) -> None:
        """See `ArrayFormat.copy`."""
        with self._errors(), zipfile.ZipFile(target, "w") as new:
            new.comment = self._comment
            for member in self._members:
                if member is not self._chosen:
                    with self._opened(member) as source:
                        _add(new, member, source)
                    continue
                with self._expanded(member) as plain:
                    overwrite(plain, _npy_layout(plain, self._uri).offset)
                    plain.seek(0)
                    _add(new, member, plain)

    def rest(self) -> object:
        """See `ArrayFormat.rest`."""
        own = None if self._chosen is None else self._chosen.filename
        return self._comment, [
            (m.filename, m.file_size, m.compress_type, m.date_time, m.filename == own or m.CRC)
            for m in self._members
        ]

    def _find(self, member: zipfile.ZipInfo) -> Layout:
        with self._errors():
            if member.compress_type != zipfile.ZIP_STORED:
                self.file = plain = self._expand(member)
                weakref.finalize(self, plain.close)
                found = _npy_layout(plain, self._uri)
                _check_size(member.file_size, found, self._uri)
                return found
            with open(self._path, "rb") as file:
                file.seek(member.header_offset + 26)
                begin = member.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
                file.seek(begin)
                found = _npy_layout(file, self._uri)
        _check_size(begin + member.file_size, found, self._uri)
        return found

    @contextmanager
    def _opened(self, member: zipfile.ZipInfo) -> Iterator[IO[bytes]]:
        with self._errors(), zipfile.ZipFile(self._path) as archive, archive.open(member) as file:
            yield file

    @contextmanager
    def _expanded(self, member: zipfile.ZipInfo) -> Iterator[IO[bytes]]:
        file = self._expand(member)
        try:
            yield file
        finally:
            file.close()

    def _expand(self, member: zipfile.ZipInfo) -> IO[bytes]:
        """Write what a member holds to a nameless file, and return it."""
        folder = self._path.parent if os.access(self._path.parent, os.W_OK) else None
        if member.file_size > free_bytes(folder or Path(tempfile.gettempdir())):
            raise StoreError(
                f"{self._uri}: '{member.filename}' takes {member.file_size:,} bytes, for which "
                "there is no space on the disk; free some, or write it without compression"
            )
        # Nameless, so that a kill leaves nothing behind.
        file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 handed on
        with self._opened(member) as source:
            shutil.copyfileobj(source, file, _COPIED)
        file.flush()
        file.seek(0)
        return file

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except _DAMAGE as error:
            raise StoreError(
                f"{self._uri} is damaged ({error}); restore it from a backup"
            ) from error


FORMATS: dict[str, type[Npy] | type[Npz] | type[SafeTensors]] = {
    "npy": Npy,
    "npz": Npz,
    "safetensors": SafeTensors,
}


def read_npy(path: Path, uri: str) -> NDArray[Any]:
    """Read the only array of a file, in memory; no pickles.

    Raises:
        StoreError: It is damaged, or no such file.
    """
    try:
        found: NDArray[Any] = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise StoreError(f"{uri}: {path}: {error}") from error
    return found


def _add(new: zipfile.ZipFile, member: zipfile.ZipInfo, source: IO[bytes]) -> None:
    told = zipfile.ZipInfo(member.filename, member.date_time)
    for name in ("compress_type", "comment", "external_attr", "internal_attr", "create_system"):
        setattr(told, name, getattr(member, name))
    with new.open(told, "w", force_zip64=True) as target:  # as numpy does
        shutil.copyfileobj(source, target, _COPIED)


def _npy_layout(file: IO[bytes], uri: str) -> Layout:
    """Read the header of a ``.npy`` file that begins where `file` is, and say where it ends."""
    try:
        version = np.lib.format.read_magic(file)
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, columns, dtype = read(file)
    except _NO_HEADER:
        raise StoreError(f"{uri}: it is no .npy file, or its header is damaged") from None
    if len(shape) != 2 or dtype.kind != "f" or dtype.itemsize not in (2, 4, 8):
        raise _no_vectors(uri, None, f"{dtype} {shape}")
    return Layout(file.tell(), dtype, shape, bool(columns))


def _check_size(size: int, found: Layout, uri: str) -> None:
    if size < found.offset + found.nbytes:
        raise StoreError(
            f"{uri} is cut off: {found.shape[0]:,} rows × {found.shape[1]:,} of {found.name} "
            f"do not fit into it; restore it from a backup"
        )
    if not found.shape[0] or not found.shape[1]:
        raise UnsupportedIndexError(
            f"{uri}: the array has the shape {found.shape}, so there is nothing to refine"
        )


def _around(path: Path, found: Layout) -> object:
    """Return what stands before the numbers, and how much stands behind."""
    with open(path, "rb") as file:
        return file.read(found.offset), path.stat().st_size


def _chosen(key: str | None, vectors: list[str], shapes: Mapping[str, str], uri: str) -> str:
    there = f"it holds {listed([f'{name} ({shape})' for name, shape in shapes.items()])}"
    if key is not None:
        if key not in shapes:
            raise ConfigError(f"{uri}: there is no array '{key}'; {there}")
        return key
    if len(vectors) != 1:
        told = " or ".join(f"?key={name}" for name in vectors[:3])
        end = f"Name one in the address: {told}" if told else "None of them holds vectors"
        raise ConfigError(f"{uri}: {there}. {end}")
    return vectors[0]


def _no_vectors(uri: str, name: str | None, what: str) -> UnsupportedIndexError:
    which = "the array" if name is None else f"the array '{name}'"
    return UnsupportedIndexError(
        f"{uri}: {which} holds {what}; vectors are an array of two dimensions, one row for each, "
        "of float16, float32 or float64"
    )
