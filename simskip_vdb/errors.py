"""Every error the project raises on purpose, and the exit code each one means.

    SimskipError                          1
    ├ ConfigError(ValueError)             2   nothing touched
    ├ MissingDependencyError(ImportError) 2   names the extra to install
    ├ DataError(ValueError)               1   NaN, duplicate id, wrong dimension, no positives
    ├ StoreError                          1   carries the URI without secrets
    │ ├ StoreNotFoundError
    │ ├ UnsupportedIndexError                 why not, and what would make it possible
    │ ├ StoreChangedError                     somebody else wrote to it meanwhile
    │ ├ VerificationError                     what was read back is not what was written
    │ ├ NothingWrittenError             5     what was proven is in no row of the index
    │ └ TransientStoreError             4     retries exhausted; the same command resumes
    ├ FitError                            1   the loss is not finite
    ├ JournalError                        1   the state on disk does not match this index
    │ └ StateInUseError                       another run holds it
    └ StoppedError                        4   asked to stop; the same command resumes

A refused gate is a result, not an error.
"""

from __future__ import annotations

from collections.abc import Sequence

LONGEST, MOST = 1200, 20_000
"""Characters of a line and of a message: what a library says of a file may be as long as that."""


NAMED = 12
"""Names that a message lists."""


def listed(names: Sequence[str]) -> str:
    """Return names for a message: the first of them, and how many more there are."""
    some = ", ".join(names[:NAMED]) or "none"
    return f"{some}, and {len(names) - NAMED:,} more" if len(names) > NAMED else some


def _cut(text: str, longest: int) -> str:
    """Leave out the middle of a text that is too long; what to do stands at its end."""
    over, half = len(text) - longest, longest // 2
    return text if over <= 0 else f"{text[:half]}… ({over:,} characters left out) …{text[-half:]}"


class SimskipError(Exception):
    """Base of every error raised on purpose."""

    exit_code = 1

    def __init__(self, message: str = "") -> None:
        message = "\n".join(_cut(line, LONGEST) for line in message.split("\n"))
        super().__init__(_cut(message, MOST))


class ConfigError(SimskipError, ValueError):
    """The command or its options make no sense; nothing was touched."""

    exit_code = 2


class MissingDependencyError(SimskipError, ImportError):
    """A package from an extra is not installed."""

    exit_code = 2

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(
            f"{package} is not installed; it comes with the extra '{extra}': "
            f"pip install 'simskip-vdb[{extra}]'"
        )
        self.package = package
        self.extra = extra

    def __reduce__(self) -> tuple[type[MissingDependencyError], tuple[str, str]]:
        """Let it come back from another process."""
        return type(self), (self.package, self.extra)


class DataError(SimskipError, ValueError):
    """Vectors or judgments that cannot be used."""


class StoreError(SimskipError):
    """A store could not be opened, read or written."""


class StoreNotFoundError(StoreError):
    """There is nothing at this address."""


class UnsupportedIndexError(StoreError):
    """This index cannot be refined; the message says why and what would make it possible."""


class StoreChangedError(StoreError):
    """Somebody else wrote to the store between reading and writing; nothing was overwritten."""


class VerificationError(StoreError):
    """What was read back is not what was written."""


class NothingWrittenError(StoreError):
    """A refinement that the gate let through reached no row; the index is as it was."""

    exit_code = 5


class TransientStoreError(StoreError):
    """The store kept failing after retries; the same command resumes."""

    exit_code = 4


class FitError(SimskipError):
    """The fit diverged."""


class JournalError(SimskipError):
    """The state on disk does not match this index, or is damaged."""


class StateInUseError(JournalError):
    """Another run holds the state; the index is in its hands."""


class StoppedError(SimskipError):
    """The run was asked to stop, or its time was up; the same command resumes."""

    exit_code = 4
