"""Every help as a person reads it: in a terminal of 80 columns."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import shlex
import struct
import subprocess
import termios
from functools import cache

import pytest
from script import SIMSKIP

from simskip_vdb import cli

WIDTH = 80


@cache
def read(*words: str) -> list[str]:
    """Return what a terminal of 80 columns shows of a command's help."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, WIDTH, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    child = subprocess.Popen(
        [SIMSKIP, *words, "--help"], stdin=theirs, stdout=theirs, stderr=theirs, env=environment
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the other end was closed
            break
        if not part:
            break
        shown += part
    os.close(ours)
    assert child.wait() == 0
    return shown.decode().replace("\r\n", "\n").splitlines()


COMMANDS = [(), *((name,) for name in cli.cli.commands)]


@pytest.mark.parametrize("words", COMMANDS)
def test_it_fits(words: tuple[str, ...]) -> None:
    lines = read(*words)
    assert len(lines) > 5
    assert [line for line in lines if len(line) > WIDTH] == []
    assert "\\b" not in "\n".join(lines)


def test_every_command_is_summed_up_in_a_line() -> None:
    lines = read()
    listed = lines[lines.index("Commands:") + 1 :][: len(cli.cli.commands)]
    assert {line.split()[0] for line in listed} == set(cli.cli.commands)
    assert not [line for line in listed if not line.endswith(".") or line.endswith("...")]


def examples(name: str) -> list[str]:
    """Return the examples, each of them whole."""
    text = re.sub(r" \\\n\s+", " ", "\n".join(read(name)))
    return [line.strip() for line in text.splitlines() if f"simskip {name} " in line][1:]


@pytest.mark.parametrize(("name", "count"), [("refine", 9), ("nightly", 2)])
def test_every_example_stands_by_itself_and_names_options_that_there_are(
    name: str, count: int
) -> None:
    found = examples(name)
    assert len(found) == count
    command = cli.cli.commands[name]
    options = {word for parameter in command.params for word in parameter.opts}
    for example in found:
        words = shlex.split(example)
        assert words.count("simskip") == 1, example
        assert {word for word in words if word.startswith("--")} <= options, example


def test_refused_and_skipped_are_told_apart() -> None:
    lines = read("refine")
    for word in ("Refused:", "Skipped and counted:", "Grade 0", "One set of judgments"):
        (at,) = (i for i, line in enumerate(lines) if line.strip().startswith(word))
        assert lines[at - 1] == ""
