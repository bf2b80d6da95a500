"""One run at a time: who holds a folder, since when, and whether this run still does.

The system's lock keeps others out, and is let go of when a process dies. It cannot help where
somebody removes its file or moves the folder; so whoever takes it leaves a note beside it, and
writes nothing any more once that note is not its own.
"""

from __future__ import annotations

import os
import platform
import uuid
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from simskip_vdb.errors import MissingDependencyError, StateInUseError, StoreError

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
            now = datetime.now(timezone.utc)
            self._text = (
                f"process {os.getpid()} on {platform.node()}, since {now:%Y-%m-%d %H:%M:%S} UTC\n"
                f"{uuid.uuid4().hex}\n"
            )
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
        """Whether this run still holds the folder."""
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
