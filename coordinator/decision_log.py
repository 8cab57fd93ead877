"""One JSON line per finished request: every decision about it with all facts, and how it went.

Appended with one write each, so that `baton explain --last` sees a request as soon as it is over.
The file is bounded: when it has grown to its limit it becomes FILE.1, replacing the one before. The
log is for people; a disk that fills up or goes away costs its lines and one warning, not requests.

Off unless asked for: the line of a request holds five numbers for each worker that was considered.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import msgspec

from baton.contract.messages import RequestReport

logger = logging.getLogger("baton.coordinator")

MAX_BYTES = 64 * 1024**2
"""Of one file; with its predecessor twice that. About 60,000 requests of a fleet of eight."""

_encode = msgspec.json.Encoder().encode


class DecisionLog:
    def __init__(self, path: Path, *, max_bytes: int = MAX_BYTES) -> None:
        """Raises OSError when the file cannot be written."""
        self._path = path
        self._max_bytes = max_bytes
        self._has_failed = False
        self._open()

    def _open(self) -> None:
        self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._num_bytes = os.fstat(self._file).st_size

    def write(self, request_id: str, decisions: list[dict[str, Any]], report: RequestReport) -> None:
        report = msgspec.structs.replace(report, prompt_logprobs=None)
        line = _encode({"request_id": request_id, "decisions": decisions, "report": report}) + b"\n"
        try:
            if self._num_bytes and self._num_bytes + len(line) > self._max_bytes:
                os.replace(self._path, self._path.with_name(self._path.name + ".1"))
                os.close(self._file)
                self._open()
            os.write(self._file, line)
            self._num_bytes += len(line)
        except OSError as error:
            if not self._has_failed:
                logger.warning("decision log failed path=%s reason=%r", self._path, error.strerror)
            self._has_failed = True

    def close(self) -> None:
        os.close(self._file)
