from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
import pytest

from simskip_vdb.errors import SimskipError

FOR_MACHINES = re.compile(r"\bnp\.\w+\(|<class '|dtype\(|std::|/project/|object at 0x")


@pytest.fixture(autouse=True)
def _messages_are_for_people() -> Iterator[None]:
    """Let no error be raised whose message shows types of numpy's, C++ or addresses in memory."""
    plain = SimskipError.__init__

    def checked(self: SimskipError, message: str = "") -> None:
        plain(self, message)
        assert not FOR_MACHINES.search(message), message

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SimskipError, "__init__", checked)
        yield


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)
