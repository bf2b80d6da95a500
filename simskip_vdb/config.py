"""Settings of the stages, as frozen dataclasses."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from simskip_vdb.datatypes import Side


class Signal(str, Enum):
    """What tells the fit which vectors belong together."""

    AUTO = "auto"
    JUDGED = "judged"
    GROUPS = "groups"
    NEIGHBOURS = "neighbours"
    AUGMENT = "augment"


@dataclass(frozen=True, slots=True, kw_only=True)
class FitSettings:
    """How a refiner is fitted.

    Attributes:
        side: What moves.
        signal: What to learn from; AUTO takes judged queries where there are any, else groups,
            else the rows' neighbours.
        seed: Seed of every random draw.
        device: ``cpu``, ``cuda`` or ``auto``.
        steps: Steps of the optimiser.
        batch_size: Anchors in a step.
        columns: Most rows that a batch's anchors are compared with.
        temperature: τ of the contrastive loss.
    """

    side: Side = Side.DOCS
    signal: Signal = Signal.AUTO
    seed: int = 0
    device: str = "cpu"
    steps: int = 240
    batch_size: int = 512
    columns: int = 16384
    temperature: float = 0.05
    lr: float = 1e-3
    lr_offsets: float = 1e-3
    decay_offsets: float = 0.0
    dropout: float = 0.3
    raw_share: float = 0.3
    distil: float = 0.0
    nca: float = 0.0
    focus: float = 0.0
    hard: int = 16
    offsets: bool = True
    checkpoints: int = 4
