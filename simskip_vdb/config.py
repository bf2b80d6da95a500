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
        steps: Most steps of the optimiser; small data takes fewer.
        batch_size: Anchors in a step.
        columns: Rows that a batch's anchors are compared with, where there are that many.
        learning_rate: Of Adam at its start; it falls to zero along a half cosine.
        dropout: Rate in f, in [0, 1).
        raw_share: Part of the columns left raw in a step, so that refined rows learn to compete
            fairly with raw ones, in [0, 1).
    """

    side: Side = Side.DOCS
    signal: Signal = Signal.AUTO
    seed: int = 0
    device: str = "cpu"
    steps: int = 240
    batch_size: int = 512
    columns: int = 4096
    learning_rate: float = 1e-3
    dropout: float = 0.3
    raw_share: float = 0.3
