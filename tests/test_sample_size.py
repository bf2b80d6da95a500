from __future__ import annotations

import numpy as np
import pytest

from simskip_vdb.sample_size import queries_needed, smallest_gain
from simskip_vdb.statistics import prove


@pytest.mark.parametrize("assumes_loss", [False, True])
@pytest.mark.parametrize("gain", [0.01, 0.05])
def test_one_is_the_other_way_round(gain: float, assumes_loss: bool) -> None:
    needed = queries_needed(gain, 0.01, 0.2, assumes_loss=assumes_loss)
    assert smallest_gain(needed, 0.01, 0.2, assumes_loss=assumes_loss) <= gain
    assert smallest_gain(needed - 1, 0.01, 0.2, assumes_loss=assumes_loss) > gain


@pytest.mark.parametrize("assumes_loss", [False, True])
def test_such_gains_are_found_about_as_often_as_said(assumes_loss: bool) -> None:
    level, queries, rng = 0.0117, 200, np.random.default_rng(1)
    gain = smallest_gain(queries, level, 0.2, assumes_loss=assumes_loss)
    drawn = rng.normal(gain, 0.2, (150, queries)).clip(-1, 1)
    found = [
        prove(one, level, i, one_more_loss=assumes_loss)[0] <= level for i, one in enumerate(drawn)
    ]
    # What is assumed to be lost, 1, is more than these lose: the promise is kept, with room.
    assert 0.7 <= np.mean(found) <= (0.97 if assumes_loss else 0.9)
