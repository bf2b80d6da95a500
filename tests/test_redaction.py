from __future__ import annotations

import pytest

from simskip_vdb.redaction import holds_secret, names_secret, redacted


@pytest.mark.parametrize(("text", "expected"), [
    ("qdrant://me:hunter2@host:6333/c", "qdrant://…@host:6333/c"),
    ("qdrant+https://hunter2@host/c?vector=v", "qdrant+https://…@host/c?vector=v"),
    ("two: a://x:hunter2@h/p and b://y:hunter2@h", "two: a://…@h/p and b://…@h"),
    ("http://h/c?api_key=hunter2&x=1", "http://h/c?api_key=…&x=1"),
    ("QDRANT_API_KEY=hunter2 simskip", "QDRANT_API_KEY=… simskip"),
    ("{'api-key': 'hunter2', 'x': 1}", "{'api-key': '…', 'x': 1}"),
    ('{"access_token":"hunter2"}', '{"access_token":"…"}'),
    ("Authorization: Bearer hunter2", "Authorization: …"),
])  # fmt: skip
def test_secrets_are_left_out(text: str, expected: str) -> None:
    assert redacted(text) == expected
    assert holds_secret(text)


@pytest.mark.parametrize("text", [
    "faiss:/data/passwords.faiss",
    "qdrant://localhost:6333/c?vector=v&filter=tenant%3D1",
    "qdrant://tokens:6333/tokens",
    "qdrant-edge:mail@home?vector=a@b",
    "keyboard=qwerty",
    "took 3 s: 5 rows",
])  # fmt: skip
def test_everything_else_is_shown(text: str) -> None:
    assert redacted(text) == text
    assert not holds_secret(text)


@pytest.mark.parametrize(("name", "secret"), [
    ("api_key", True), ("QDRANT_API_KEY", True), ("apikey", True), ("db-password", True),
    ("passwd", True), ("auth_token", True), ("client_secret", True), ("private_key", True),
    ("index", False), ("guard_field", False), ("key", False), ("nprobe", False),
])  # fmt: skip
def test_names_tell_secrets(name: str, secret: bool) -> None:
    assert names_secret(name) is secret
