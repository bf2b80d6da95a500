"""What each query was used for, and how often the test queries were looked at."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from simskip_vdb.datatypes import Split
from simskip_vdb.durable import has_file, json_of, write_durably
from simskip_vdb.errors import JournalError


class Ledger:
    """Which split each query belongs to, and who looked at the test queries.

    A query's split is never changed once recorded. The number of a look is one more than the
    most often any of its queries was looked at before, so that adding queries to a test set does
    not make it new; looking again at the same refiner with the same queries and judgments
    is the same look.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "ledger.json"
        self.splits: dict[str, str] = {}
        self.looked: dict[str, int] = {}
        self.looks: list[dict[str, Any]] = []
        if has_file(self._path):
            try:
                data = json_of(self._path.read_bytes())
                self.splits, self.looked, self.looks = _checked(data)
            except (ValueError, KeyError, TypeError) as error:
                raise JournalError(
                    f"{self._path} cannot be read ({error}); restore it from a backup: without it "
                    "earlier looks at the test queries would be forgotten"
                ) from error

    def assign(self, splits: Mapping[str, str]) -> None:
        """Record the splits of queries; what is recorded already stays."""
        merged = {**splits, **self.splits}
        if merged != self.splits:
            self.splits = merged
            self._save()

    def look(self, refiner: str, measure: str, content: str, query_ids: Iterable[str]) -> int:
        """Count a look at these test queries before it happens, and return its number.

        Args:
            refiner: Id of the refiner that is compared with what the index holds.
            measure: The chosen measure.
            content: Digest of the queries and their judgments.
            query_ids: All test queries.
        """
        names = sorted(query_ids)
        key = {"refiner": refiner, "measure": measure, "test": content}
        for earlier in self.looks:
            if {name: earlier[name] for name in key} == key:
                return int(earlier["look"])
        number = 1 + max((self.looked.get(name, 0) for name in names), default=0)
        self.looked.update(dict.fromkeys(names, number))
        self.looks.append({**key, "look": number, "queries": len(names), "time": time.time()})
        self._save()
        return number

    def _save(self) -> None:
        data = {"splits": self.splits, "looked": self.looked, "looks": self.looks}
        write_durably(self._path, json.dumps(data).encode())


def _checked(
    data: Mapping[str, Any],
) -> tuple[dict[str, str], dict[str, int], list[dict[str, Any]]]:
    splits, looked, looks = (data[key] for key in ("splits", "looked", "looks"))
    for value, kind in ((splits, dict), (looked, dict), (looks, list)):
        if not isinstance(value, kind):
            raise TypeError(f"{type(value).__name__} where {kind.__name__} belongs")
    for split in set(splits.values()):
        Split(split)
    return splits, looked, looks
