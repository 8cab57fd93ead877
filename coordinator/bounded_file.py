"""A file of lines that is appended to and bounded: at its limit it becomes FILE.1, replacing the one
before. What is written here is for people and tools beside the service: a disk that fills up or goes
away costs its lines and one warning, not requests."""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from pathlib import Path

logger = logging.getLogger("baton.coordinator")


class BoundedFile:
    def __init__(self, path: Path, *, what: str, max_bytes: int) -> None:
        """`what`: its name in the warning. Raises OSError when the file cannot be written."""
        self._path = path
        self._what = what
        self._max_bytes = max_bytes
        self._has_failed = False
        self._open()

    def _open(self) -> None:
        self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._num_bytes = os.fstat(self._file).st_size

    def _begin_anew(self) -> None:
        with suppress(FileNotFoundError):  # somebody took it away, or a new one could not be opened before
            os.replace(self._path, self._path.with_name(self._path.name + ".1"))
        old = self._file
        self._open()
        os.close(old)  # only now: a closed number may soon be somebody's socket

    def write(self, line: bytes) -> None:
        """With one write, so that a reader sees whole lines."""
        try:
            if self._num_bytes and self._num_bytes + len(line) > self._max_bytes:
                self._begin_anew()
            os.write(self._file, line)
            self._num_bytes += len(line)
        except OSError as error:
            if not self._has_failed:
                logger.warning("%s failed path=%s reason=%r", self._what, self._path, error.strerror)
            self._has_failed = True

    def close(self) -> None:
        os.close(self._file)
