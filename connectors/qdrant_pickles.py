"""Points in a folder of local mode are pickles, which can run code: looked at before loading."""

from __future__ import annotations

import io
import pickle
import sqlite3
from contextlib import closing
from enum import Enum
from pathlib import Path
from urllib.parse import quote

from pydantic import BaseModel

from simskip_vdb.errors import StoreError, UnsupportedIndexError

_CLIENT = "qdrant_client.http.models.models"
_PLAIN = {
    ("builtins", "bytearray"),
    ("builtins", "complex"),
    ("builtins", "frozenset"),
    ("builtins", "set"),
    ("collections", "OrderedDict"),
    ("datetime", "date"),
    ("datetime", "datetime"),
    ("datetime", "time"),
    ("datetime", "timedelta"),
    ("datetime", "timezone"),
    ("decimal", "Decimal"),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("uuid", "UUID"),
    *(
        (f"numpy.{core}.{module}", name)
        for core in ("core", "_core")
        for module, name in (
            ("multiarray", "_reconstruct"),
            ("multiarray", "scalar"),
            ("numeric", "_frombuffer"),
        )
    ),
}
"""What points may be made of beside the client's own models: values, whose making runs nothing."""


def refuse_code(folder: Path, uri: str) -> None:
    """Make sure that loading the points of a folder's collections runs no code of the folder's.

    Raises:
        UnsupportedIndexError: A point would.
        StoreError: The points cannot be read.
    """
    for file in sorted(folder.glob("collection/*/storage.sqlite")):
        try:
            with closing(sqlite3.connect(f"file:{quote(str(file))}?mode=ro", uri=True)) as storage:
                tables = storage.execute("SELECT name FROM sqlite_master WHERE name = 'points'")
                for _ in tables.fetchall():
                    for (point,) in storage.execute("SELECT point FROM points"):
                        _Looked(io.BytesIO(point)).load()
        except _Code as code:
            raise UnsupportedIndexError(
                f"{uri}: a point of the collection '{file.parent.name}' is a pickle that uses "
                f"'{code}' when it is loaded, which may run any code; it was not loaded. Points as "
                "qdrant-client writes them hold plain values: write such a collection anew from "
                "where its data comes from"
            ) from None
        except sqlite3.Error as error:
            raise StoreError(f"{uri}: {file}: {error}") from error
        except Exception as error:
            raise StoreError(
                f"{uri}: {file} holds what is no point ({type(error).__name__}: {error}); restore "
                "the folder from a backup"
            ) from error


class _Code(Exception):
    """A pickle names something that is no value."""


class _Looked(pickle.Unpickler):
    """Loads values and the client's models, and nothing else."""

    def find_class(self, module: str, name: str) -> object:
        """Return a class of values; see `pickle.Unpickler.find_class`."""
        if (module, name) in _PLAIN:
            return super().find_class(module, name)
        if module == _CLIENT and name.isidentifier():
            found = super().find_class(module, name)
            if isinstance(found, type) and issubclass(found, BaseModel | Enum):
                return found
        raise _Code(f"{module}.{name}")
