"""One JSON line per finished request: every decision about it with all facts, and how it went.

Appended with one write each, so that `baton explain --last` sees a request as soon as it is over; bounded
(`bounded_file.py`). Off unless asked for: the line of a request holds five numbers for each worker that
was considered.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from baton.contract.messages import RequestReport
from coordinator.bounded_file import BoundedFile

MAX_BYTES = 64 * 1024**2
"""Of one file; with its predecessor twice that. About 60,000 requests of a fleet of eight."""

_encode = msgspec.json.Encoder().encode


class DecisionLog:
    def __init__(self, path: Path, *, max_bytes: int = MAX_BYTES) -> None:
        """Raises OSError when the file cannot be written."""
        self._file = BoundedFile(path, what="decision log", max_bytes=max_bytes)

    def write(self, request_id: str, decisions: list[dict[str, Any]], report: RequestReport) -> None:
        report = msgspec.structs.replace(report, prompt_logprobs=None)
        self._file.write(
            _encode({"request_id": request_id, "decisions": decisions, "report": report}) + b"\n"
        )

    def close(self) -> None:
        self._file.close()
