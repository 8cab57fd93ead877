"""One request's whole story: what its client heard, and every line of every process that names it or one of
its attempts, in the order of time; beside them what happened to the workers that served it."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from baton.history.log_lines import LogLine, read_log
from baton.history.reader import BrokenRun, log_files
from baton.history.records import REQUESTS_FILE, RUN_FILE, Ask, Kill, Pause, RunRecord

MAX_CHUNKS = 6
"""Chunks told one by one; of a longer answer the first and last, and the longest silences."""

_REQUEST = re.compile(r"""request_id(?:=|":)('[^']*'|"[^"]*"|[^\s,]+)""")
_HANDOFF = re.compile(r'handoff_id(?:=|":")([\w-]+)')
_WORKER = re.compile(r"(?:prefill_worker|decode_worker|worker_id)(?:=|\":\")([\w.-]+)")
_MEMBERSHIP = ("worker lost", "worker registered", "worker refused", "worker leaving", "worker starting",
               "worker ready", "drain started", "engine died", "coordinator lost", "coordinator ready",
               "coordinator stopped", "registration refused")  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Event:
    at_s: float
    who: str
    text: str


def story(folder: Path, request_id: str) -> str:
    """For people. Raises BrokenRun if nothing in the folder knows the request."""
    asks = _asks(folder, request_id)
    lines = [line for path in log_files(folder) for line in read_log(path) if _may_be_told(line)]
    names = {request_id, *(ask.request_id for ask in asks)}
    named = [not names.isdisjoint(_request_ids(line.text)) for line in lines]
    handoffs = {
        found for line, is_named in zip(lines, named, strict=True) if is_named
        for found in _HANDOFF.findall(line.text)
    }  # fmt: skip
    # Unlike a client's request id these are ours and unique: any mention will do.
    mention = re.compile(rf"(?<![\w-])(?:{'|'.join(map(re.escape, sorted(handoffs)))})(?![\w-])")
    own = [
        line for line, is_named in zip(lines, named, strict=True)
        if is_named or (handoffs and mention.search(line.text))
    ]  # fmt: skip
    events = [_Event(line.at_s, line.process, line.text) for line in own]
    events += [event for ask in asks for event in _client_events(ask)]
    if not events:
        raise BrokenRun(f"nothing in {folder} knows request {request_id}")
    start_s, end_s = (end(event.at_s for event in events) for end in (min, max))
    workers = {found for line in own for found in _WORKER.findall(line.text)}
    processes = {line.process for line in own}
    events += [
        event for event in _around(folder, lines, workers, processes) if start_s <= event.at_s <= end_s
    ]
    events.sort(key=lambda event: event.at_s)  # stable: what one process logged stays in its order
    width = max(len(event.who) for event in events)
    attempts = "1 attempt" if len(handoffs) == 1 else f"{len(handoffs)} attempts"
    return "\n".join(
        [
            f"request {request_id}, {attempts}, {end_s - start_s:.3f} s from {_clock(start_s)}",
            *(f"{event.at_s - start_s:9.3f}  {event.who:<{width}}  {event.text}" for event in events),
        ]
    )


def _request_ids(text: str) -> set[str]:
    return {found.strip("'\"") for found in _REQUEST.findall(text)}


def _may_be_told(line: LogLine) -> bool:
    return "request_id" in line.text or "handoff" in line.text or line.text.startswith(_MEMBERSHIP)


def _asks(folder: Path, request_id: str) -> list[Ask]:
    path = folder / REQUESTS_FILE
    if not path.exists():
        return []
    key = f'"request_id":"{request_id}"'.encode()
    decoder = msgspec.json.Decoder(Ask)
    with path.open("rb") as file:
        return [decoder.decode(line) for line in file if key in line]


def _client_events(ask: Ask) -> Iterator[_Event]:
    who = "client"
    yield _Event(
        ask.submitted_s,
        who,
        f"asks job={ask.job} number={ask.number} num_prompt_tokens={ask.num_prompt_tokens} "
        f"max_tokens={ask.max_tokens}",
    )
    chunks = ask.chunks
    told = set(range(len(chunks)))
    if len(chunks) > MAX_CHUNKS:
        silences = sorted(
            range(1, len(chunks)), key=lambda i: chunks[i - 1].at_s - chunks[i].at_s
        )  # longest first
        told = {0, len(chunks) - 1, *silences[: MAX_CHUNKS - 2]}
    for index in sorted(told):
        chunk = chunks[index]
        last = chunk.first_index + len(chunk.token_ids) - 1
        yield _Event(chunk.at_s, who, f"hears tokens {chunk.first_index} to {last}: {chunk.token_ids}")
    error = "" if ask.error is None else f" code={ask.error.code} message={ask.error.message!r}"
    yield _Event(
        ask.ended_s,
        who,
        f"{ask.end.value} status={ask.status} num_tokens={len(ask.token_ids)}{error}",
    )


def _around(
    folder: Path, lines: Iterable[LogLine], workers: set[str], processes: set[str]
) -> Iterator[_Event]:
    """What happened meanwhile to those who had a part in it."""
    for line in lines:
        if line.text.startswith(_MEMBERSHIP) and (
            line.process in processes or any(found in workers for found in _WORKER.findall(line.text))
        ):
            yield _Event(line.at_s, line.process, line.text)
    for done in _done_to_the_fleet(folder):
        if done.name in workers or done.name == "coordinator":
            yield _Event(
                done.at_s, "operator", f"{'kills' if isinstance(done, Kill) else 'stops'} {done.name}"
            )
            if isinstance(done, Pause):
                yield _Event(done.until_s, "operator", f"lets {done.name} go on")


def _done_to_the_fleet(folder: Path) -> Iterator[Kill | Pause]:
    path = folder / RUN_FILE
    if path.exists():
        decoder: msgspec.json.Decoder[RunRecord] = msgspec.json.Decoder(RunRecord)
        for line in path.read_bytes().splitlines():
            if b'"FleetSnapshot"' not in line and isinstance(note := decoder.decode(line), Kill | Pause):
                yield note


def _clock(at_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at_s)) + f".{int(at_s % 1 * 1000):03d}"
