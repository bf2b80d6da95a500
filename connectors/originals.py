"""The exact vectors behind lossy codes, read from a ``.npy`` file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from simskip_vdb.connectors.rows import RowOrder
from simskip_vdb.datatypes import Ids, Vectors
from simskip_vdb.errors import ConfigError, DataError


class ArrayRows:
    """Vectors in an array, found by id; see `ExactVectors`."""

    def __init__(self, rows: RowOrder, vectors: Vectors, name: str) -> None:
        """Pair ids with vectors, shape (n, d).

        Raises:
            DataError: There are not as many vectors as ids.
        """
        if len(vectors) != len(rows):
            raise DataError(
                f"{name} holds {len(vectors):,} vectors for {len(rows):,} rows; give one for each "
                "row of the index in its order, or name their ids with --originals-ids"
            )
        self._rows = rows
        self._vectors = vectors

    def fetch(self, ids: Ids) -> Vectors:
        """Return the vectors of these ids; see `ExactVectors.fetch`."""
        return np.asarray(self._vectors[self._rows.positions(ids)], np.float32)


def read_vectors(path: Path) -> Vectors:
    """Map a ``.npy`` file of vectors, shape (n, d), of float16, 32 or 64.

    Raises:
        DataError: It is not such a file.
    """
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path}: {error}; --originals takes a .npy file of vectors") from error
    if array.ndim != 2 or array.dtype.kind != "f":
        raise DataError(
            f"{path} holds {array.dtype} of shape {array.shape}, not one vector of floating "
            "numbers a row"
        )
    vectors: Vectors = array
    return vectors


def read_ids(path: Path) -> NDArray[np.int64]:
    """Read ids, one a line; those of unsigned 64 bits as FAISS holds them.

    Raises:
        ConfigError: A line is not a whole number.
    """
    try:
        texts = path.read_text().split()
        try:
            return np.array(texts, np.int64)
        except OverflowError:
            return np.array(texts, np.uint64).view(np.int64)
    except (OSError, ValueError, OverflowError) as error:
        raise ConfigError(
            f"{path}: {error}; --originals-ids takes the index's id of each vector, one a line"
        ) from error
