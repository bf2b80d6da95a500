"""How many threads libraries use, and how those wait for each other."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from threading import Lock
from typing import Any

POLICY, ASLEEP = "OMP_WAIT_POLICY", "PASSIVE"


def wait_asleep() -> None:
    """Let OpenMP's threads sleep while they wait, unless the user chose otherwise.

    Those of torch and FAISS spin by default: on two cores beside another busy process, two threads
    took fifteen times as long as one. OpenMP reads the choice when it is loaded.
    """
    if "torch" not in sys.modules and "faiss" not in sys.modules:
        os.environ.setdefault(POLICY, ASLEEP)


def asleep() -> bool:
    """Tell whether OpenMP's threads sleep while they wait."""
    return os.environ.get(POLICY, "").upper() == ASLEEP


_lock = Lock()
_held: list[Any] = []


@contextmanager
def blas_on_one_thread() -> Iterator[None]:
    """Keep BLAS, which has one setting for all threads, to one while anybody needs it so."""
    with _lock:
        _held.append(_held[0] if _held else _blas().limit(limits=1, user_api="blas"))
    try:
        yield
    finally:
        with _lock:
            limit = _held.pop()
            if not _held:
                limit.restore_original_limits()


@cache
def _blas() -> Any:  # noqa: ANN401 untyped
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()
