"""Vectors where a fit runs: all of them if they fit there, else sent as they are drawn."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from simskip_vdb.datatypes import Positions, Vectors

RESIDENT_SHARE = 0.5
"""Part of a device's free memory that vectors may take."""


class Resident:
    """Vectors that are drawn from by position.

    Args:
        vectors: Shape (n, d), float32.
        device: Where tensors go.
    """

    def __init__(self, vectors: Vectors, device: str) -> None:
        self._vectors = vectors
        self._device = torch.device(device)
        self._resident: Tensor | None = None
        if vectors.nbytes <= RESIDENT_SHARE * _free(self._device):
            self._resident = torch.as_tensor(vectors, device=self._device)

    def take(self, rows: Positions) -> Tensor:
        """Return vectors at positions, shape (len(rows), d), on the device."""
        if self._resident is not None:
            return self._resident[torch.as_tensor(rows, device=self._device)]
        drawn = torch.from_numpy(np.ascontiguousarray(self._vectors[rows], np.float32))
        if self._device.type == "cuda":
            drawn = drawn.pin_memory()
        return drawn.to(self._device, non_blocking=True)


def _free(device: torch.device) -> float:
    """Return the free memory of a device in bytes; none of main memory, where rows are already."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0.0
