"""How many threads torch works with, and how they wait for each other."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

POLICY, ASLEEP = "OMP_WAIT_POLICY", "PASSIVE"


def wait_asleep() -> None:
    """Let OpenMP's threads sleep while they wait, unless the user chose otherwise.

    Those of torch and FAISS spin by default: on two cores beside another busy process, two threads
    took fifteen times as long as one. OpenMP reads the choice when it is loaded.
    """
    if "torch" not in sys.modules and "faiss" not in sys.modules:
        os.environ.setdefault(POLICY, ASLEEP)


@contextmanager
def torch_threads() -> Iterator[None]:
    """Use all threads of torch if they wait asleep, else half of the cores."""
    import torch

    before = torch.get_num_threads()
    if os.environ.get(POLICY, "").upper() != ASLEEP:
        torch.set_num_threads(min(before, max(1, (os.cpu_count() or 1) // 2)))
    try:
        yield
    finally:
        torch.set_num_threads(before)
