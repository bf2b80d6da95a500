"""Progress, drawn for a person."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm


class Bars:
    """A progress bar for each stage, on a terminal only."""

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None
        self._stage = ""

    def __enter__(self) -> Bars:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show how far a stage is."""
        if stage != self._stage or self._bar is None or done < self._bar.n:
            self._close()
            self._stage = stage
            self._bar = tqdm(
                desc=stage, total=total, unit_scale=True, disable=None, delay=0.5, leave=False
            )
        self._bar.update(done - self._bar.n)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
