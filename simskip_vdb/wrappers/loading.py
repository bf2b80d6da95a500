"""What every wrapper does: load the refiner that the service expects, and check what passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from simskip_vdb.datatypes import Metric
from simskip_vdb.errors import ConfigError, DataError
from simskip_vdb.refiner import Refiner


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What a service expects of its refiner; None expects nothing.

    Attributes:
        revision: The refiner's id, 12 hex digits, as `simskip status` shows it.
        dim: Dimension of the vectors.
        metric: Metric of the index: ``cosine``, ``dot`` or ``euclid``.

    Raises:
        ConfigError: There is no such metric.
    """

    revision: str | None = None
    dim: int | None = None
    metric: str | None = None

    def __post_init__(self) -> None:
        if self.metric is None:
            return
        try:
            object.__setattr__(self, "metric", Metric(self.metric).value)
        except ValueError:
            known = ", ".join(metric.value for metric in Metric)
            raise ConfigError(f"there is no metric {self.metric!r}; give one of {known}") from None

    def check(self, refiner: Refiner) -> None:
        """Make sure that a refiner is the expected one.

        Raises:
            ConfigError: Its revision, dimension or metric is another.
        """
        compared = {
            "revision": (refiner.id, self.revision),
            "dimension": (refiner.dim, self.dim),
            "metric": (
                refiner.metric.value,
                None if self.metric is None else Metric(self.metric).value,
            ),
        }
        wrong = [
            f"{name} {found}, not {expected}"
            for name, (found, expected) in compared.items()
            if expected not in (None, found)
        ]
        if wrong:
            raise ConfigError(
                f"refiner {refiner.id} has {'; '.join(wrong)}; load the refiner that wrote the "
                "index (simskip status INDEX), or change what is expected"
            )


ANYTHING = Expected()


def load(refiner: Refiner | Path | str, expect: Expected = ANYTHING) -> Refiner:
    """Return a refiner, read from its folder if need be, that is the expected one.

    Raises:
        ConfigError: It is another one, or there is none in the folder.
        DataError: Its files are damaged.
    """
    loaded = refiner if isinstance(refiner, Refiner) else Refiner.load(refiner)
    expect.check(loaded)
    return loaded


def check_dim(refiner: Refiner, dim: int) -> None:
    """Make sure that an embedding model gives vectors that the refiner takes.

    Raises:
        DataError: They have another dimension.
    """
    if dim != refiner.dim:
        raise DataError(
            f"the embedding model gives {dim} dimensions, refiner {refiner.id} takes "
            f"{refiner.dim}; use the model that the index was embedded with"
        )


def refined_query(refiner: Refiner, vector: Sequence[float]) -> list[float]:
    """Return one query's vector, refined where queries move.

    Raises:
        DataError: It has another dimension than the refiner.
    """
    check_dim(refiner, len(vector))
    refined: list[float] = refiner(np.asarray([vector]))[0].tolist()
    return refined


def checked_documents(refiner: Refiner, vectors: list[list[float]]) -> list[list[float]]:
    """Return documents' vectors as they are.

    Raises:
        DataError: One has another dimension than the refiner.
    """
    for vector in vectors:
        check_dim(refiner, len(vector))
    return vectors
