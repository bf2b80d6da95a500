from __future__ import annotations

import numpy as np
import pytest

from simskip_vdb.sample_size import queries_needed, smallest_gain
from simskip_vdb.statistics import prove


@pytest.mark.parametrize("assumed_loss", [0.0, 1.0])
@pytest.mark.parametrize("gain", [0.01, 0.05])
def test_one_is_the_other_way_round(gain: float, assumed_loss: float) -> None:
    needed = queries_needed(gain, 0.01, 0.2, assumed_loss=assumed_loss)
    assert smallest_gain(needed, 0.01, 0.2, assumed_loss=assumed_loss) <= gain
    assert smallest_gain(needed - 1, 0.01, 0.2, assumed_loss=assumed_loss) > gain


@pytest.mark.parametrize("assumed_loss", [0.0, 1.0])
def test_such_gains_are_found_about_as_often_as_said(assumed_loss: float) -> None:
    level, queries, rng = 0.0117, 200, np.random.default_rng(1)
    gain = smallest_gain(queries, level, 0.2, assumed_loss=assumed_loss)
    drawn = rng.normal(gain, 0.2, (150, queries)).clip(-1, 1)
    found = [
        prove(one, level, i, assumed_loss=assumed_loss)[0] <= level for i, one in enumerate(drawn)
    ]
    # What is assumed to be lost, 1, is more than these lose: the promise is kept, with room.
    assert 0.7 <= np.mean(found) <= (0.97 if assumed_loss else 0.9)
