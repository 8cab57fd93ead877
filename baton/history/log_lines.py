"""The lines that the fleet's processes log, read back (`baton.telemetry` writes them)."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

_LINE = re.compile(rb"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)\.(\d{3}) (\w+) \S+ (.*)")
_FIELD = re.compile(r"""(\w+)=('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|\S+)""")


@dataclass(frozen=True, slots=True)
class LogLine:
    at_s: float
    """Seconds since 1970; logs have local time, so they are read where they were written."""
    process: str
    """The log's name without `.log`."""
    level: str
    text: str

    @property
    def fields(self) -> dict[str, str]:
        """The line's key=value pairs."""
        return {key: _plain(value) for key, value in _FIELD.findall(self.text)}


def read_log(path: Path) -> Iterator[LogLine]:
    """Events only: what other libraries write in between is passed over."""
    second, start_s = b"", 0.0
    with path.open("rb") as file:
        for raw in file:
            match = _LINE.match(raw)
            if match is None:
                continue
            if match[1] != second:  # hundreds of lines share one: parsing it is the costly part
                second = match[1]
                start_s = datetime.strptime(second.decode(), "%Y-%m-%d %H:%M:%S").timestamp()
            text = match[4].decode("utf-8", errors="replace")
            yield LogLine(start_s + int(match[2]) / 1000, path.stem, match[3].decode(), text)


def _plain(value: str) -> str:
    if value[0] not in "'\"":
        return value
    try:
        return str(ast.literal_eval(value))
    except (ValueError, SyntaxError):
        return value
