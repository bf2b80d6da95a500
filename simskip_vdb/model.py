"""The trained part of a refiner: f, and what is around it; the projector of the label-free loss."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from simskip_vdb.moving import NEAREST, Layer


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
        half = max(1, dim // 2)
        self.down = nn.Linear(dim, half)
        self.down_norm = nn.BatchNorm1d(half)
        self.up = nn.Linear(half, dim)
        self.up_norm = nn.BatchNorm1d(dim)
        self.dropout = Dropout(dropout)
        self.last = nn.Linear(dim, dim)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map unit rows, shape (n, d), to moves of the same shape."""
        h = self.dropout(F.relu(self.down_norm(self.down(x))))  # (n, d // 2)
        h = self.dropout(F.relu(self.up_norm(self.up(h))))  # (n, d)
        out: Tensor = self.last(h)
        return out

    def folded(self) -> tuple[Layer, ...]:
        """Return the three linear layers with BatchNorm's running statistics folded in."""
        last = (_array(self.last.weight), _array(self.last.bias))
        return (_fold(self.down, self.down_norm), _fold(self.up, self.up_norm), last)


class Dropout(nn.Module):
    """Dropout whose rate is a multiple of 1/256, so that one draw serves eight numbers.

    Drawing takes longer than f's products otherwise.

    Args:
        rate: In [0, 1).
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self._dropped = round(256 * rate)

    def forward(self, x: Tensor) -> Tensor:
        """Zero a part of x and scale up the rest, while training."""
        if not self.training or not self._dropped:
            return x
        words = torch.empty(-(-x.numel() // 8), dtype=torch.int64, device=x.device)
        words.random_(-(2**63), None)
        kept = words.view(torch.uint8)[: x.numel()].view_as(x) >= self._dropped
        return x * kept.to(x.dtype).mul_(256 / (256 - self._dropped))


def directions(x: Tensor, origin: Tensor) -> tuple[Tensor, Tensor]:
    """Return the directions of unit rows, shape (n, d), from an origin, and distances (n, 1)."""
    apart = x - origin
    length = apart.norm(dim=1, keepdim=True).clamp_min(NEAREST)
    return apart / length, length


def moved(x: Tensor, origin: Tensor, move: Callable[[Tensor], Tensor]) -> Tensor:
    """Move unit rows on the sphere around an origin that each lies on, as `moving` does.

    Args:
        x: Shape (n, d).
        origin: µ, shape (d,).
        move: Maps directions from the origin, shape (n, d), to moves of the same shape.

    Returns:
        Unit rows, shape (n, d).
    """
    direction, length = directions(x, origin)
    return F.normalize(origin + length * F.normalize(direction + move(direction), dim=1), dim=1)


def projector(dim: int) -> nn.Sequential:
    """Return SimCLR's projector d → d → 128, which is dropped after the fit."""
    return nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, 128))


def _fold(linear: nn.Linear, norm: nn.BatchNorm1d) -> Layer:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    bias = (linear.bias - norm.running_mean) * scale + norm.bias
    return _array(linear.weight * scale[:, None]), _array(bias)


def _array(tensor: Tensor) -> NDArray[np.float32]:
    return tensor.detach().cpu().numpy().astype(np.float32)
