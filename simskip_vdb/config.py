"""Settings of the stages, as frozen dataclasses."""

from __future__ import annotations

from dataclasses import dataclass

from simskip_vdb.datatypes import Side


@dataclass(frozen=True, slots=True, kw_only=True)
class FitSettings:
    """How a refiner is fitted."""

    side: Side = Side.DOCS
    seed: int = 0
    device: str = "cpu"
