"""One run at a time: who holds a folder, since when, and whether this run still does.

The system's lock keeps others out, and is let go of when a process dies. It cannot help where
somebody removes its file or moves the folder; so whoever takes it leaves a note beside it, and
writes nothing any more once that note is not its own.
"""

from __future__ import annotations

import logging
import os
import platform
import uuid
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from simskip_vdb.errors import (
    MissingDependencyError,
    StateInUseError,
    StoreError,
    TransientStoreError,
)
from simskip_vdb.store import VectorStore, abilities

log = logging.getLogger(__name__)

LOCK, HOLDER = "lock", "holder"


class Claim:
    """A folder that one run holds at a time.

    Args:
        folder: Made where it is missing.
        what: What is held, for people.
        passing: Whether the files, and the folder where it is empty, go with the claim.
    """

    def __init__(self, folder: Path, *, what: str, passing: bool = False) -> None:
        self._folder, self._lock_file, self._note = folder, folder / LOCK, folder / HOLDER
        self._what, self._passing = what, passing
        self._lock: Any = None
        self._text = ""

    def take(self) -> None:
        """Take the folder, or raise.

        Raises:
            StateInUseError: Another run holds it.
            StoreError: The folder cannot be written.
        """
        try:
            import filelock
        except ImportError:
            raise MissingDependencyError("filelock", "eval") from None
        try:
            # What is in it must not be readable for more people than the index is.
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = filelock.FileLock(self._lock_file, timeout=0)
            self._lock.acquire()
            self._text = f"{_whoami()}\n{uuid.uuid4().hex}\n"
            self._note.write_text(self._text, encoding="utf-8")
        except filelock.Timeout:
            self._lock = None
            raise StateInUseError(
                f"another run{self._holder()} holds {self._what}; wait for it to end, then run "
                f"the same command. Only if it runs on a machine that is gone, remove "
                f"{self._lock_file}"
            ) from None
        except OSError as error:
            if self._lock is not None:
                self._lock.release()
                self._lock = None
            if self._passing:  # nobody can write there, so nobody can leave word of its state
                log.info("%s is not held: %s", self._what, error)
                self._text = ""
                return
            raise StoreError(
                f"cannot write the state folder {self._folder}: {error}; "
                "choose another with --state DIR"
            ) from error

    def check(self) -> None:
        """Make sure that this run still holds the folder.

        Raises:
            StateInUseError: Another run took it over, or it was moved away.
        """
        if not self.held:
            raise StateInUseError(
                f"{self._what} was taken over by another run{self._holder()}, or was moved away "
                "while this one went on; this one writes nothing more. Run the command again"
            )

    @property
    def held(self) -> bool:
        """Whether this run still holds the folder, or there is nothing to hold."""
        if not self._text:
            return True
        try:
            return self._note.read_text(encoding="utf-8") == self._text
        except (OSError, ValueError):
            return False

    def drop(self) -> None:
        """Let go of the folder."""
        if self._lock is None:
            return
        try:
            if self.held:
                with suppress(OSError):
                    self._note.unlink()
                    if self._passing:
                        self._lock_file.unlink()
                        self._folder.rmdir()
        finally:
            self._lock.release()
            self._lock = None

    def _holder(self) -> str:
        try:
            return f" ({self._note.read_text(encoding='utf-8').splitlines()[0]})"
        except (OSError, ValueError, IndexError):
            return ""


class StoreClaim:
    """A store that one run writes at a time, whatever machine it is on; the store says which.

    A server cannot compare and set. Who writes over another's claim at the same moment is told by
    looking again: before the first row, and before every batch.

    Args:
        store: It may be `Claimable`; else there is nothing to hold.
        state: The state's id. A run that died is followed up by one with the same state.
    """

    def __init__(self, store: VectorStore, state: str) -> None:
        self._store = abilities(store).claims
        self._uri, self._state = store.info().uri, state
        self._token = ""

    def take(self) -> None:
        """Take the store, or raise.

        Raises:
            StateInUseError: Another run writes it.
        """
        if self._store is None:
            return
        there = self._store.claimed()
        if there is not None and there.get("state") != self._state:
            raise StateInUseError(self._told(there))
        note = {"state": self._state, "token": uuid.uuid4().hex, "who": _whoami()}
        try:
            self._store.claim(note)
        except TransientStoreError:
            raise
        except StoreError as error:
            log.warning("nobody else is kept from writing %s meanwhile: %s", self._uri, error)
            return
        held = self._store.claimed()
        if held is not None:  # a server that is too old keeps no claim
            self._token = note["token"]
            self.check()

    def check(self) -> None:
        """Make sure that this run still holds the store.

        Raises:
            StateInUseError: Another run took it over.
        """
        if not self.held:
            assert self._store is not None
            raise StateInUseError(self._told(self._store.claimed() or {}))

    @property
    def held(self) -> bool:
        """Whether this run still holds the store, or there is nothing to hold."""
        if not self._token or self._store is None:
            return True
        return (self._store.claimed() or {}).get("token") == self._token

    def drop(self) -> None:
        """Let go of the store."""
        if self._token and self._store is not None:
            try:
                if self.held:
                    self._store.claim(None)
            except StoreError as error:  # a rollback removes a copy, and a server may be gone
                log.info("%s: the claim was left: %s", self._uri, error)
        self._token = ""

    def _told(self, there: Mapping[str, Any]) -> str:
        return (
            f"{self._uri}: another run ({there.get('who', 'unknown')}) writes it; this one writes "
            "nothing more. Wait for it to end, then run the same command. Only if that run is gone "
            "and cannot be finished where its state is, take the key 'simskip-claim' out of the "
            "collection's metadata"
        )


def _whoami() -> str:
    now = datetime.now(timezone.utc)
    return f"process {os.getpid()} on {platform.node()}, since {now:%Y-%m-%d %H:%M:%S} UTC"
