"""Tell, night after night, whether the refinement that is live does harm to fresh queries."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

FALSE_ALARM = 0.05
"""Chance that a refinement which does no harm is ever called harmful, however long it is live."""
_MOST = 0.75
"""Largest bet; a query that gains 1 would end all betting at 1."""
_PRIOR_VARIANCE = 0.04
"""Variance of a query's difference before any is seen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HarmWatch:
    """A bet that fresh queries lose by a refinement, which grows only if they do.

    Each query's loss x = before - after, from -1 to 1, multiplies the wealth by 1 + λx, where λ
    depends on earlier queries alone. While the mean loss is at most 0, the wealth is a
    supermartingale: the probability that it ever reaches 1/.05 is at most .05, whenever one looks
    and stops (Ville, 1939; Waudby-Smith & Ramdas, Estimating means of bounded random variables by
    betting, JRSS B 2024, whose aGRAPA bets these are).

    Attributes:
        refiner: Id of the refiner that is live.
        queries: How many fresh queries were seen.
        gain: Sum of their gains, after - before.
        squares: Sum of the squares of their gains.
        log_wealth: Logarithm of the wealth.
        harmful: Whether the wealth ever reached 1/.05.
    """

    refiner: str
    queries: int = 0
    gain: float = 0.0
    squares: float = 0.0
    log_wealth: float = 0.0
    harmful: bool = False

    @property
    def mean(self) -> float | None:
        """Mean gain of the fresh queries; None before any is seen."""
        return self.gain / self.queries if self.queries else None

    @property
    def p(self) -> float:
        """Bound on the probability of such losses without harm, valid at any time."""
        return min(1.0, math.exp(-self.log_wealth))

    def to_dict(self) -> dict[str, Any]:
        """Return refiner, queries, gain (their mean), p and harmful as plain JSON values."""
        return {
            "refiner": self.refiner,
            "queries": self.queries,
            "gain": self.mean,
            "p": self.p,
            "harmful": self.harmful,
        }

    def seeing(self, gains: NDArray[np.float64]) -> HarmWatch:
        """Return the watch after more fresh queries.

        Args:
            gains: Shape (m,); after minus before of each, between -1 and 1, in an order that does
                not depend on them.

        Raises:
            ValueError: A gain is not between -1 and 1.
        """
        if not np.all(np.abs(gains) <= 1):
            raise ValueError("gains must be between -1 and 1")
        losses = -gains
        count = self.queries + np.arange(len(losses))
        mean = (-self.gain + _before(losses)) / (count + 1)
        second = (self.squares + _before(losses**2) + _PRIOR_VARIANCE) / (count + 1)
        bets = np.clip(mean / np.maximum(second, 1e-12), 0.0, _MOST)
        wealth = self.log_wealth + np.cumsum(np.log1p(bets * losses))
        return replace(
            self,
            queries=self.queries + len(losses),
            gain=self.gain + float(gains.sum()),
            squares=self.squares + float((gains**2).sum()),
            log_wealth=float(wealth[-1]) if len(wealth) else self.log_wealth,
            harmful=self.harmful or bool(np.any(wealth >= -math.log(FALSE_ALARM))),
        )


def _before(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the sum of what came before each value."""
    return np.concatenate([[0.0], np.cumsum(values)])[: len(values)]
