"""What the fleet was asked: one short JSON line per finished request, in the plain trace form that
`baton replay` and `baton plan` read. No prompts, no tokens: arrival, lengths, cached tokens, times.

Requests that failed or were refused are left out: how long their output would have been is unknown.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec

from baton.contract.lifecycle import Outcome
from baton.contract.messages import RequestReport
from coordinator.bounded_file import BoundedFile
from coordinator.first_token import seconds_to_first_token

MAX_BYTES = 16 * 1024**2
"""Of one file; with its predecessor twice that. About 120,000 requests each."""

_encode = msgspec.json.Encoder().encode


class WorkloadLog:
    def __init__(self, path: Path, wall_s: Callable[[], float], *, max_bytes: int = MAX_BYTES) -> None:
        """`wall_s`: seconds since 1970, so that the lines of two coordinator runs follow each other.
        Raises OSError when the file cannot be written."""
        self._file = BoundedFile(path, what="workload log", max_bytes=max_bytes)
        self._wall_s = wall_s

    def on_finished(self, report: RequestReport) -> None:
        if report.outcome is not Outcome.COMPLETED or not report.num_output_tokens:
            return
        phases = report.phases
        ttft_s = seconds_to_first_token(report)
        whole_s = phases.queue_s + phases.prefill_s + phases.handoff_s + phases.decode_s
        line = {
            "arrival_s": round(self._wall_s() - whole_s, 3),
            "num_prompt_tokens": report.num_prompt_tokens,
            "num_output_tokens": report.num_output_tokens,
            "num_cached_tokens": report.num_cached_tokens,
            "ttft_s": round(ttft_s, 4),
            "tpot_s": round((whole_s - ttft_s) / max(1, report.num_output_tokens - 1), 5),
        }
        self._file.write(_encode(line) + b"\n")

    def close(self) -> None:
        self._file.close()
