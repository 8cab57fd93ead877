"""A run's folder to facts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from baton.contract.messages import RequestReport
from baton.history.facts import CoordinatorRecord, Finished, History, WorkerRecord
from baton.history.log_lines import LogLine, read_log
from baton.history.records import (
    REQUESTS_FILE,
    RUN_FILE,
    Ask,
    FleetSnapshot,
    Kill,
    Limits,
    RunRecord,
)


class BrokenRun(Exception):
    """A sentence: what of the folder is missing or cannot be read."""


class _FinishedLine(msgspec.Struct):
    """The coordinator's log line at a request's end, as far as it is used here."""

    request_id: str
    handoff_id: str
    whole_s: float
    report: RequestReport


_finished_line = msgspec.json.Decoder(_FinishedLine)


def read_run(folder: Path) -> History:
    """Raises BrokenRun."""
    if not folder.is_dir():
        raise BrokenRun(f"{folder} is not a folder")
    notes: list[RunRecord] = list(_lines(folder / RUN_FILE, RunRecord))
    history = History(
        asks=list(_lines(folder / REQUESTS_FILE, Ask)),
        kills=[note for note in notes if isinstance(note, Kill)],
        snapshots=[note for note in notes if isinstance(note, FleetSnapshot)],
        limits=next((note for note in notes if isinstance(note, Limits)), None),
    )
    history.coordinators, history.workers = read_processes(folder)
    if not history.asks:
        raise BrokenRun(f"{folder / REQUESTS_FILE} holds no request")
    return history


def read_processes(folder: Path) -> tuple[list[CoordinatorRecord], list[WorkerRecord]]:
    """From their logs, in the order in which they started. Raises BrokenRun."""
    coordinators: list[CoordinatorRecord] = []
    workers: list[WorkerRecord] = []
    for path in log_files(folder):
        _read_process(path, coordinators, workers)
    coordinators.sort(key=lambda coordinator: coordinator.ready_s or 0.0)
    workers.sort(key=lambda worker: worker.started_s)
    return coordinators, workers


def log_files(folder: Path) -> list[Path]:
    """Of the fleet's processes, wherever in the folder they lie."""
    return sorted(folder.rglob("*.log"))


def _lines(path: Path, kind: Any) -> Iterator[Any]:
    if not path.exists():
        return
    decoder: msgspec.json.Decoder[Any] = msgspec.json.Decoder(kind)
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield decoder.decode(line)
            except msgspec.DecodeError as error:
                raise BrokenRun(f"{path}:{number}: {error}") from error


def _read_process(path: Path, coordinators: list[CoordinatorRecord], workers: list[WorkerRecord]) -> None:
    coordinator = CoordinatorRecord(path.stem)
    worker: WorkerRecord | None = None
    for line in read_log(path):
        if line.text.startswith("worker starting "):
            worker = WorkerRecord(path.stem, line.fields["worker_id"], line.at_s)
            workers.append(worker)
        elif worker is not None:
            _read_worker(line, worker)
        else:
            _read_coordinator(line, coordinator)
    if coordinator.ready_s is not None:
        coordinators.append(coordinator)


def _read_worker(line: LogLine, record: WorkerRecord) -> None:
    text = line.text
    if text.startswith("leg started "):
        fields = line.fields
        record.open_legs[fields["handoff_id"]] = fields["request_id"]
    elif text.startswith(("leg finished ", "leg failed ")):
        fields = line.fields
        record.leg_ends_s.append(line.at_s)
        if record.open_legs.pop(fields["handoff_id"], None) is None:
            record.stray_ends.append((fields["request_id"], fields["handoff_id"]))
    elif text.startswith("coordinator lost "):
        record.open_legs.clear()
    elif text.startswith("worker stopped"):
        record.stopped_s = line.at_s


def _read_coordinator(line: LogLine, record: CoordinatorRecord) -> None:
    text, at_s = line.text, line.at_s
    if text.startswith('{"event":"request finished"'):
        try:
            word = _finished_line.decode(text)
        except msgspec.DecodeError as error:
            raise BrokenRun(f"{line.process}: a final word that cannot be read: {error}") from error
        record.finished.setdefault(word.request_id, []).append(
            Finished(at_s, word.whole_s, word.handoff_id, word.report)
        )
    elif text.startswith("request accepted "):
        record.accepted.setdefault(line.fields["request_id"], []).append(at_s)
    elif text.startswith("attempt started "):
        record.attempts.setdefault(line.fields["request_id"], []).append(at_s)
    elif text.startswith("attempt failed "):
        record.failed_attempts.setdefault(line.fields["request_id"], []).append(at_s)
    elif text.startswith("coordinator ready "):
        record.ready_s = at_s
    elif text == "coordinator stopped":
        record.stopped_s = at_s
