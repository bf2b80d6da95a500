"""What was known when a refiner was last fitted, so that a night can tell whether to fit again."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from simskip_vdb.durable import has_file, json_of, write_durably
from simskip_vdb.errors import JournalError
from simskip_vdb.judgments import Judgments, QuerySet

SCHEMA = 1
FILE = "attempt.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """The last fit, whether its refiner was written or refused.

    Attributes:
        time: Seconds since the epoch.
        refiner: Id of what was fitted.
        judged: Digest of each query with its judgments, by query id, as they were then.
        tests: How often drift was tested since.
    """

    time: float
    refiner: str
    judged: Mapping[str, str]
    tests: int = 0

    def save(self, folder: Path) -> None:
        """Write it to a state folder."""
        data = json.dumps({"schema": SCHEMA, **asdict(self)}).encode()
        write_durably(folder / FILE, data)

    @classmethod
    def load(cls, folder: Path) -> Attempt | None:
        """Read what a state folder holds; None where nothing was fitted yet.

        Raises:
            JournalError: The file is damaged, or a newer version wrote it.
        """
        path = folder / FILE
        if not has_file(path):
            return None
        try:
            data = json_of(path.read_bytes())
            if data.pop("schema") != SCHEMA:
                raise ValueError("a newer version wrote it; upgrade simskip-vdb")
            found = cls(**data)
            if not isinstance(found.judged, dict):
                raise TypeError("judged is no object")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise JournalError(
                f"{path} cannot be read ({error}); restore it from a backup, or remove it: then "
                "the next night fits anew"
            ) from error
        return found

    def new(self, judged: Mapping[str, str]) -> list[str]:
        """Return the queries that came, or were judged anew, since; in their order."""
        return [name for name, digest in judged.items() if self.judged.get(name) != digest]


def judged_ids(judgments: Judgments) -> set[str]:
    """Return the ids of all queries that are given."""
    return {name for given in _sets(judgments) for name in given.ids}


def judged_digests(judgments: Judgments) -> dict[str, str]:
    """Hash each query that is given, with its vector and judgments: 16 hex digits by query id."""
    found: dict[str, str] = {}
    for given in _sets(judgments):
        found |= _digests(given)
    return found


def _sets(judgments: Judgments) -> list[QuerySet]:
    given = (judgments.queries, judgments.dev, judgments.test)
    return [one for one in given if one is not None]


def _digests(given: QuerySet) -> dict[str, str]:
    answers: defaultdict[str, set[str]] = defaultdict(set)
    if given.qrels is not None:
        qrels = given.qrels
        triples = zip(qrels.query_ids, qrels.doc_ids, qrels.grades.tolist(), strict=True)
        for query, doc, grade in triples:
            answers[query].add(f"{grade}\t{doc}")
    if given.labels is not None:
        for query, label in zip(given.ids, given.labels, strict=True):
            answers[query].add(label)
    digests = {}
    for name, vector in zip(given.ids, given.vectors, strict=True):
        text = "\n".join(sorted(answers[name])).encode()
        digests[name] = hashlib.blake2b(vector.tobytes() + text, digest_size=8).hexdigest()
    return digests
