"""How large a gain so many test queries can prove, and how many would prove a given one."""

from __future__ import annotations

import math
from statistics import NormalDist

POWER = 0.8
"""How often a gain should be found that is there."""
TYPICAL_SPREAD = 0.2
"""Standard deviation of a query's gain where none was seen; .09 to .26 on the sets of
``docs/quality.md``."""


def smallest_gain(
    queries: int, level: float, spread: float, *, assumed_loss: float, power: float = POWER
) -> float:
    """Return the mean gain that a look finds with a given probability.

    By the normal approximation of the paired test.

    Args:
        queries: Number of test queries, above 0.
        level: One-sided level of the look, between 0 and 1.
        spread: Standard deviation of the queries' differences.
        assumed_loss: What one more query is assumed to lose at most (`Look.assumed_loss`).
        power: The probability.
    """
    gain = _standard_errors(level, power) * spread / math.sqrt(queries)
    return gain + assumed_loss / queries


def queries_needed(
    gain: float, level: float, spread: float, *, assumed_loss: float, power: float = POWER
) -> int:
    """Return how many test queries find a mean gain with a given probability.

    Args:
        gain: Mean gain, above 0.
        level: As in `smallest_gain`.
        spread: As in `smallest_gain`.
        assumed_loss: As in `smallest_gain`.
        power: The probability.
    """
    errors = _standard_errors(level, power) * spread
    # gain n - errors sqrt(n) - assumed_loss = 0
    root = (errors + math.sqrt(errors**2 + 4 * gain * assumed_loss)) / (2 * gain)
    return math.ceil(root**2)


def _standard_errors(level: float, power: float) -> float:
    normal = NormalDist()
    return normal.inv_cdf(1 - level) + normal.inv_cdf(power)
