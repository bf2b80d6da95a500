"""Move vectors as `moving` does, by torch on a GPU: rows go there and back while others compute."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from simskip_vdb.datatypes import Mask, Positions, Vectors
from simskip_vdb.moving import NEAREST, Formula

PIECE = 32768
"""Rows on the device at once, on each of the streams."""
STREAMS = 2


class OnDevice:
    """A formula on a device, in float32.

    Args:
        formula: What to compute.
        device: A torch device.
    """

    def __init__(self, formula: Formula, device: str) -> None:
        self._device = torch.device(device)
        self._origin = self._there(formula.origin)
        self._layers = [
            (self._there(weight).T, self._there(bias)) for weight, bias in formula.layers
        ]
        # One more, of zeros, for rows that have none.
        none = np.zeros((1, formula.offsets.shape[1]), np.float32)
        self._offsets = self._there(np.concatenate([formula.offsets, none])) * formula.beta
        self._streams = [self._stream() for _ in range(STREAMS)]
        if self._device.type == "cuda":  # other streams do not wait for what was sent on this one
            torch.cuda.synchronize(self._device)

    def f(self, x: Vectors) -> None:
        """Return nothing to share: here computing again costs less than sending."""

    def apply(self, x: Vectors, slots: Positions, move: Mask, f: Vectors | None = None) -> Vectors:
        """Move rows.

        Args:
            x: Shape (n, d).
            slots: Each row's offset, -1 for none, shape (n,).
            move: Rows that move, shape (n,); the others are returned bit for bit.
            f: Not used.

        Returns:
            Shape (n, d).
        """
        on_gpu = self._device.type == "cuda"
        target = torch.empty(x.shape, dtype=torch.float32, pin_memory=on_gpu)
        slots = np.where(slots < 0, len(self._offsets) - 1, slots)
        for number, start in enumerate(range(0, len(x), PIECE)):
            piece = slice(start, start + PIECE)
            with self._streams[number % STREAMS]:
                arrays = (self._there(array[piece]) for array in (x, slots, move))
                target[piece].copy_(self._moved(*arrays), non_blocking=on_gpu)
        if on_gpu:
            torch.cuda.synchronize(self._device)
        out: Vectors = target.numpy()
        return out

    def _moved(self, x: Tensor, slots: Tensor, move: Tensor) -> Tensor:
        norms = x.double().norm(dim=1)
        unit = (x / torch.where(norms > 0, norms, 1.0)[:, None]).float()
        if len(self._origin):
            unit = unit - self._origin
            apart = unit.double().norm(dim=1)
            move = move & (apart > NEAREST)
            unit = unit / torch.where(apart > NEAREST, apart, 1.0).float()[:, None]
        moved = unit
        if self._layers:
            h = unit
            for weight, bias in self._layers[:-1]:
                h = torch.addmm(bias, h, weight).relu_()
            weight, bias = self._layers[-1]
            moved = torch.addmm(bias, h, weight) + unit
        else:
            move = move & (slots < len(self._offsets) - 1)
        moved = moved + self._offsets[slots]
        lengths = moved.double().norm(dim=1)
        if len(self._origin):
            move = move & (lengths > 0)
            size = apart / torch.where(lengths > 0, lengths, 1.0)
            moved = self._origin + moved * size.float()[:, None]
            lengths = moved.double().norm(dim=1)
        scale = norms / torch.where(lengths > 0, lengths, 1.0)
        moved = moved * scale.float()[:, None]
        # A direction that vanished or a number that overflowed has no refined form.
        move = move & (norms > 0) & (lengths > 0) & moved.isfinite().all(dim=1)
        return torch.where(move[:, None], moved, x)

    def _there(self, array: NDArray[Any]) -> Tensor:
        """Send an array, by way of pinned memory, so that it travels while others compute."""
        here = torch.tensor(array)
        if self._device.type == "cuda":
            here = here.pin_memory()
        return here.to(self._device, non_blocking=True)

    def _stream(self) -> AbstractContextManager[object]:
        if self._device.type != "cuda":
            return nullcontext()
        return torch.cuda.stream(torch.cuda.Stream(self._device))  # type: ignore[no-untyped-call]
