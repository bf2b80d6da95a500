"""A fit that was interrupted goes on where it was: to the same bits, on the same CPU."""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from simskip_vdb.durable import write_durably

SECONDS = 60.0
"""Time between two checkpoints, which is the most that is lost."""
_CHECKSUM = hashlib.sha256().digest_size


class Checkpoint:
    """A file that holds everything that the rest of a fit depends on.

    Args:
        path: The file; None to keep nothing.
        problem: What is fitted, as arrays; what was saved of another problem is passed over.
        parts: Modules and optimisers by name.
        rng: Source of the draws.
    """

    def __init__(
        self,
        path: Path | None,
        problem: Iterable[NDArray[Any] | None],
        parts: Mapping[str, Any],
        rng: np.random.Generator,
    ) -> None:
        self._path = path
        self._problem = "" if path is None else _digest(problem)
        self._parts = parts
        self._rng = rng
        self._time = time.monotonic()

    def restore(self, order: NDArray[np.int64]) -> tuple[int, NDArray[np.int64]]:
        """Take up what was saved, and return the steps done and the anchors left, in their order.

        Args:
            order: The anchors of a fit that starts; returned with 0 where nothing usable was saved.
        """
        if self._path is None or not self._path.is_file():
            return 0, order
        try:
            with open(self._path, "rb") as file:
                checksum, content = file.read(_CHECKSUM), file.read()
            if hashlib.sha256(content).digest() != checksum:
                return 0, order  # damage costs the time of the steps again, nothing more
            saved = torch.load(io.BytesIO(content), weights_only=True)
        except (OSError, RuntimeError):  # it cannot be read, or is of a device that is not here
            return 0, order
        if (saved["torch"], saved.get("problem")) != (torch.__version__, self._problem):
            return 0, order
        for name, part in self._parts.items():
            part.load_state_dict(saved["parts"][name])
        self._rng.bit_generator.state = json.loads(saved["numpy_random"])
        torch.set_rng_state(saved["torch_random"])
        return saved["step"], saved["order"].numpy()

    def save(self, step: int, order: NDArray[np.int64], *, last: bool) -> None:
        """Save the state if it is time, or if this is the last step of a fit that took long."""
        now = time.monotonic()
        if self._path is None or now - self._time < SECONDS * (0.1 if last else 1):
            return
        self._time = now
        state = {
            "torch": str(torch.__version__),
            "problem": self._problem,
            "parts": {name: part.state_dict() for name, part in self._parts.items()},
            "numpy_random": json.dumps(self._rng.bit_generator.state),
            "torch_random": torch.get_rng_state(),
            "step": step,
            "order": torch.as_tensor(order),
        }
        buffer = io.BytesIO()
        buffer.write(bytes(_CHECKSUM))
        torch.save(state, buffer)
        content = buffer.getbuffer()
        content[:_CHECKSUM] = hashlib.sha256(content[_CHECKSUM:]).digest()
        write_durably(self._path, content)


def _digest(arrays: Iterable[NDArray[Any] | None]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(b"none" if array is None else f"{array.dtype.str}{array.shape}".encode())
        if array is not None:
            digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
