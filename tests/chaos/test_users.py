"""How often a client asks, and what a run is judged by."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from baton.contract.errors import ErrorReport
from baton.contract.lifecycle import Outcome
from baton.history import Ask, End, RunWriter, check, read_run
from tests.chaos import users
from tests.chaos.client import Job
from tests.chaos.figures import judge
from tests.chaos.scenario import Run
from tests.chaos.users import MAX_RETRIES, Done, Users
from tests.history.recorded import ask, coordinator_log, snapshot, worker_snapshot, write_run

JOB = Job(name="j", prompt=[1], max_tokens=1, golden=None)


def served(
    folder: Path, monkeypatch: pytest.MonkeyPatch, ends: list[Ask]
) -> tuple[list[str], list[float], Done]:
    """Request ids and pauses of one job, asked of a fleet that answers like this, the last for ever."""
    asked: list[str] = []
    pauses: list[float] = []

    async def fake_ask(port: int, job: Job, request_id: str, number: int, timeout_s: float) -> Ask:
        asked.append(request_id)
        return ends[min(number, len(ends) - 1)]

    async def fake_sleep(seconds: float) -> None:
        pauses.append(seconds)

    monkeypatch.setattr(users, "ask", fake_ask)
    monkeypatch.setattr(asyncio, "sleep", fake_sleep)
    with RunWriter(folder) as writer:
        crowd = Users(1, writer, lambda: JOB, timeout_s=1.0)
        asyncio.run(crowd.serve(JOB))
    assert len((folder / "requests.jsonl").read_bytes().splitlines()) == len(asked)
    return asked, pauses, crowd.done[0]


LOST = ask(end=End.CONNECTION_LOST, status=None)
BUSY = ask(end=End.REFUSED, status=503, headers={"retry-after": "4"})
WRONG = ask(end=End.REFUSED, status=400)
FAILED = ask(end=End.FAILED)


def test_a_client_asks_again_until_it_is_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked, pauses, done = served(tmp_path, monkeypatch, [LOST, BUSY, LOST, ask()])
    assert asked == ["j.0", "j.1", "j.2", "j.3"]
    # 0.5 s, what the fleet said, 2 s; up to a quarter less
    assert 0.375 <= pauses[0] <= 0.5 and pauses[1] == 4.0 and 1.5 <= pauses[2] <= 2.0
    assert done == Done(End.COMPLETED, 4)


@pytest.mark.parametrize("last", [WRONG, FAILED], ids=["its own mistake", "an error within a stream"])
def test_what_is_not_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: Ask):
    _, _, done = served(tmp_path, monkeypatch, [LOST, last])
    assert done == Done(last.end, 2)


def test_a_client_gives_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked, pauses, done = served(tmp_path, monkeypatch, [LOST])
    assert len(asked) == 1 + MAX_RETRIES and max(pauses) <= 8.0
    assert done.last is End.CONNECTION_LOST


def judged(folder: Path, done: list[Done]) -> dict[str, bool | None]:
    history = read_run(folder)
    run = Run(
        done=done, most_in_flight=1, load_s=1.0, quiet_after_s=None, num_workers_back=4, history=history,
        violations=check(history),
    )  # fmt: skip
    return {figure.row: figure.holds for figure in judge("test", run, num_workers=4).figures}


def test_a_run_that_went_well_holds_every_bar(tmp_path: Path):
    holds = judged(write_run(tmp_path), [Done(End.COMPLETED, 1)])
    assert False not in holds.values() and list(holds.values()).count(True) == 7


def test_what_went_wrong_misses_its_bar(tmp_path: Path):
    """One request failed within its stream with a wrong token in it, one hangs, and a block is held."""
    lost = ErrorReport(code="worker_lost", message="gone")
    failed = ask(end=End.FAILED, error=lost, golden=[1, 2, 3, 4, 5])
    run = write_run(
        tmp_path,
        [failed, ask("r2", end=End.HUNG)],
        logs={"coordinator-0": coordinator_log(outcome=Outcome.FAILED, error=lost)},
        snapshots=[snapshot(worker_snapshot("decode-1", num_used_blocks=1))],
    )
    holds = judged(run, [Done(End.FAILED, 1), Done(End.HUNG, 1)])
    assert {row for row, is_held in holds.items() if is_held is False} == {
        "answered in the end",
        "completed while their coordinator lived",
        "hung",
        "wrong",
        "held after quiet time",
        "violations of the history's rules",
    }
