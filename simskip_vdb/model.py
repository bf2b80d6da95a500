"""The trained part of a refiner: f, and the projector of the label-free loss."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from simskip_vdb.refiner import Layer


class Residual(nn.Module):
    """f: d → max(1, d // 2) → d → d, starting at zero so that the skip starts as the identity.

    The first two layers are each Linear, BatchNorm, ReLU and Dropout; the last is linear.
    Source: SimSkip, arXiv:2404.08701; the widths are a public re-implementation's.

    Args:
        dim: Dimension d.
        dropout: Rate of each dropout, in [0, 1).
    """

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        widths = (dim, max(1, dim // 2), dim)
        self.hidden = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Linear(before, after), nn.BatchNorm1d(after), nn.ReLU(), nn.Dropout(dropout)
                )
                for before, after in zip(widths, widths[1:], strict=False)
            )
        )
        self.last = nn.Linear(dim, dim)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map unit rows, shape (n, d), to moves of the same shape."""
        out: Tensor = self.last(self.hidden(x))
        return out

    def folded(self) -> tuple[Layer, ...]:
        """Return the three linear layers with BatchNorm's running statistics folded in."""
        layers = []
        for linear, norm, *_ in self.hidden:  # type: ignore[misc]
            scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
            layers.append(
                (
                    _array(linear.weight * scale[:, None]),
                    _array((linear.bias - norm.running_mean) * scale + norm.bias),
                )
            )
        return (*layers, (_array(self.last.weight), _array(self.last.bias)))


def projector(dim: int) -> nn.Sequential:
    """Return SimCLR's projector d → d → 128, which is dropped after the fit."""
    return nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, 128))


def _array(tensor: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return tensor.detach().cpu().numpy().astype(np.float32)
