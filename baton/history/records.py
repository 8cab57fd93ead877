"""What is written down while a fleet runs: by its clients, and by whoever starts and kills it.

    requests.jsonl   one `Ask` per line, written when it is over for its client
    run.jsonl        `Limits`, `Kill`, `Pause` and `FleetSnapshot`, as they happen
    *.log            of the fleet's processes, written by themselves

All times are seconds since 1970 on the clock that the logs have too, so that everything sorts together.
"""

from __future__ import annotations

import time
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from baton.contract.errors import ErrorReport
from baton.contract.messages import PhaseTimes

REQUESTS_FILE = "requests.jsonl"
RUN_FILE = "run.jsonl"


class End(str, Enum):
    """How a request ended for its client."""

    COMPLETED = "completed"
    REFUSED = "refused"
    """An error instead of an answer: nothing of it had been sent."""
    FAILED = "failed"
    """An error inside a stream that had begun."""
    CONNECTION_LOST = "connection lost"
    """Refused, reset or closed before the answer was complete: all that a dead coordinator can say."""
    LEFT = "left"
    """The client itself hung up."""
    HUNG = "hung"
    """The client gave up waiting."""


class Chunk(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One piece of an answer."""

    at_s: float
    first_index: int
    """Of its first token in the whole answer, as the coordinator counts (continuous usage)."""
    token_ids: list[int]


class Usage(msgspec.Struct, frozen=True, gc=False):
    prompt_tokens: int
    completion_tokens: int


class Ask(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One request as its client saw it. Who asks again after a failure writes a second one with the same
    `job`, the next `number` and a request id of its own."""

    request_id: str
    """The `x-request-id` sent and answered."""
    job: str
    number: int = 0
    submitted_s: float
    ended_s: float = 0.0
    end: End
    num_prompt_tokens: int
    max_tokens: int
    golden: list[int] | None = None
    """The only right answer: of a greedy request whose answer is known."""
    status: int | None = None
    """HTTP; None: not even a status line came."""
    chunks: list[Chunk] = []
    num_ends: int = 0
    """Final words heard: finish reason with [DONE], or one error. One of a request that was answered."""
    num_late_events: int = 0
    """Heard after the final word."""
    finish_reason: str | None = None
    error: ErrorReport | None = None
    usage: Usage | None = None
    phases: PhaseTimes | None = None
    """As told to the client."""
    headers: dict[str, str] = {}
    """Those of ours: `x-baton-*`, `retry-after`."""

    @property
    def token_ids(self) -> list[int]:
        return [token_id for chunk in self.chunks for token_id in chunk.token_ids]


class Limits(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """What the fleet of this run was told to keep to, in seconds."""

    queue_s: float
    prefill_s: float
    handoff_s: float
    stall_s: float
    """Longest silence between two tokens."""
    heartbeat_s: float
    """Silence after which a worker is given up."""
    lease_s: float
    max_attempts: int
    slack_s: float = 2.0
    """For timers that look a few times a second, on a machine that has other things to do."""


class Kill(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """SIGKILL to one process. `name` is the worker's id, or `coordinator`."""

    at_s: float
    name: str
    back_s: float | None = None
    """When its successor had been started."""


class Pause(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """SIGSTOP to one process and its engine, and SIGCONT later."""

    at_s: float
    name: str
    until_s: float


class FleetSnapshot(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """`GET /fleet`."""

    at_s: float
    fleet: dict[str, Any]
    is_quiet: bool = False
    """Taken when nobody had asked for anything for longer than a lease."""


RunRecord = Limits | Kill | Pause | FleetSnapshot


class RunWriter:
    """Appends to the records of one run, one write per line: what was written survives the writer."""

    def __init__(self, folder: Path) -> None:
        """`folder` gets the files. Raises OSError when it cannot."""
        folder.mkdir(parents=True, exist_ok=True)
        self._requests = (folder / REQUESTS_FILE).open("ab")
        self._run = (folder / RUN_FILE).open("ab", buffering=0)
        self._encode = msgspec.json.Encoder().encode

    def ask(self, ask: Ask) -> None:
        self._requests.write(self._encode(ask) + b"\n")

    def note(self, record: RunRecord) -> None:
        self._run.write(self._encode(record) + b"\n")

    def snapshot(self, fleet: dict[str, Any], *, is_quiet: bool = False) -> None:
        self.note(FleetSnapshot(at_s=time.time(), fleet=fleet, is_quiet=is_quiet))

    def close(self) -> None:
        self._requests.close()
        self._run.close()

    def __enter__(self) -> RunWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
