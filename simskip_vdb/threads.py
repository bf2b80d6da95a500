"""How threads of OpenMP wait for each other."""

from __future__ import annotations

import os
import sys

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
