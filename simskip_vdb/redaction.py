"""Tell secrets by what they are called or where they stand, and leave them out of what is shown."""

from __future__ import annotations

import re

_NAMES = (
    r"[\w.-]*(?:api[_.-]?key|passw|passphrase|pwd|token|secret|credential|private[_.-]?key"
    r"|authorization)[\w.-]*"
)
_NAME = re.compile(_NAMES, re.IGNORECASE)
_USER = re.compile(r"(?<=://)[^/?#\s'\"]*@")
_PAIR = re.compile(
    rf"\b({_NAMES})(['\"]?\s*(?:=|:(?=[\s'\"]))\s*['\"]?)(?:bearer\s+)?[^\s&;,'\"]+", re.IGNORECASE
)
"""``api_key=…``, ``api-key: …`` and ``"api_key":"…"``, but not ``tokens:6333``, a host."""


def names_secret(name: str) -> bool:
    """Tell whether a setting of this name would hold a secret."""
    return _NAME.fullmatch(name) is not None


def holds_secret(text: str) -> bool:
    """Tell whether an address holds a user, a password, or a setting that is called like one."""
    return redacted(text) != text


def redacted(text: str) -> str:
    """Return text with users and passwords of addresses and values of secret settings as ``…``."""
    return _PAIR.sub(r"\1\2…", _USER.sub("…@", text))
