"""Each rule finds what is planted for it, and nothing in a run that went well."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import msgspec
import pytest

from baton.contract.errors import ErrorReport, ServingError
from baton.contract.lifecycle import Outcome
from baton.contract.messages import PhaseTimes
from baton.history import RULES, BrokenRun, Chunk, End, Kill, Usage, check, read_run
from baton.history.checker import HTTP_CODES
from baton.history.history_command import main
from coordinator.http import errors as http_errors
from tests.history.recorded import (
    GOLDEN,
    PHASES,
    START_S,
    Log,
    ask,
    coordinator_log,
    decode_log,
    report,
    snapshot,
    worker_snapshot,
    write_run,
)

LOST = ErrorReport(code="worker_lost", message="worker decode-1 was lost", phase="decoding")


def without(text: str, log: Log) -> Log:
    log.lines = [line for line in log.lines if text not in line]
    return log


def dead_coordinator() -> Log:
    """Killed one second after it accepted."""
    log = coordinator_log()
    log.lines = log.lines[:3]
    return log


UNFINISHED: dict[str, Any] = {"num_ends": 0, "usage": None, "phases": None, "finish_reason": None}
REFUSED: dict[str, Any] = UNFINISHED | {"end": End.REFUSED, "num_ends": 1, "status": 503, "chunks": []}
KILLED = Kill(at_s=START_S + 5.2, name="coordinator", back_s=START_S + 5.3)
NEXT = Log("coordinator").say(6.0, "coordinator ready boot_id=def pid=9").say(70.0, "coordinator stopped")

CLEAN: dict[str, dict[str, Any]] = {
    "answered": {},
    "refused at the door": {
        "asks": [ask(), ask("r2", **REFUSED, error=ErrorReport(code="no_workers", message="none"))]
    },
    "failed before a whole answer was whole": {
        "asks": [ask(**REFUSED | {"status": 502}, error=LOST)],
        "logs": {"coordinator-0": coordinator_log(outcome=Outcome.FAILED, error=LOST)},
    },
    "failed within the stream": {
        "asks": [ask(**UNFINISHED | {"end": End.FAILED, "num_ends": 1}, error=LOST)],
        "logs": {"coordinator-0": coordinator_log(outcome=Outcome.FAILED, error=LOST)},
    },
    "the client left before the end": {
        "asks": [ask(**UNFINISHED, end=End.LEFT)],
        "logs": {"coordinator-0": coordinator_log(outcome=Outcome.ABORTED, num_output_tokens=6)},
    },
    "a leg on a worker that was killed": {
        "logs": {"decode-1-0": decode_log().say(6.0, "leg started handoff_id=h2 request_id=r2")},
    },
    "a leg abandoned with its coordinator": {
        "logs": {
            "decode-1-0": decode_log()
            .say(6.0, "leg started handoff_id=h2 request_id=r2 num_prompt_tokens=8")
            .say(7.0, "coordinator lost reason='it does not know us' num_legs=1", "warning")
            .say(70.0, "worker stopped reason='SIGTERM received'")
        },
    },
    "the coordinator was killed": {
        "asks": [ask(**UNFINISHED, end=End.CONNECTION_LOST)],
        "logs": {"coordinator-0": dead_coordinator(), "coordinator-1": NEXT},
        "kills": [KILLED],
    },
}


@pytest.mark.parametrize("case", CLEAN)
def test_a_run_that_went_well_is_clean(tmp_path: Path, case: str):
    assert [str(violation) for violation in check(read_run(write_run(tmp_path, **CLEAN[case])))] == []


def at(seconds: float, index: int, *token_ids: int) -> Chunk:
    return Chunk(START_S + 5.0 + seconds, index, list(token_ids))


PLANTED: dict[str, tuple[str, dict[str, Any]]] = {
    "a request without an end": ("ends once", {"asks": [ask(**UNFINISHED | {"end": End.HUNG})]}),
    "two final words": ("ends once", {"asks": [ask(num_ends=2)]}),
    "a token after the final word": ("ends once", {"asks": [ask(num_late_events=1)]}),
    "a connection lost to a living coordinator": (
        "ends once",
        {"asks": [ask(**UNFINISHED, end=End.CONNECTION_LOST)]},
    ),
    "a connection lost before the kill": (
        "ends once",
        {
            "asks": [ask(**UNFINISHED, end=End.CONNECTION_LOST)],
            "kills": [msgspec.structs.replace(KILLED, at_s=START_S + 5.6)],
        },
    ),
    "a coordinator that forgot a request": (
        "ends once",
        {"logs": {"coordinator-0": without("request finished", coordinator_log())}},
    ),
    "a coordinator that ended one twice": (
        "ends once",
        {"logs": {"coordinator-0": coordinator_log().finishes(5.5, "r1", "h1", report())}},
    ),
    "an end nobody asked for": (
        "ends once",
        {"logs": {"coordinator-0": without("request accepted", coordinator_log())}},
    ),
    "a leg without an end": (
        "legs end",
        {
            "logs": {
                "decode-1-0": decode_log()
                .say(6.0, "leg started handoff_id=h2 request_id=r1 num_prompt_tokens=8")
                .say(70.0, "worker stopped reason='SIGTERM received'")
            }
        },
    ),
    "a leg that ended twice": (
        "legs end",
        {
            "logs": {
                "decode-1-0": decode_log().say(5.5, "leg failed handoff_id=h1 request_id=r1 code=aborted")
            }
        },
    ),
    "an answer without a record": (
        "outcomes agree",
        {"asks": [ask(), ask("r2")]},
    ),
    "completed here, failed there": (
        "outcomes agree",
        {"logs": {"coordinator-0": coordinator_log(outcome=Outcome.FAILED, error=LOST)}},
    ),
    "a token repeated": (
        "token order",
        {"asks": [ask(chunks=[at(0.1, 0, 104, 101), at(0.2, 1, 101), at(0.5, 3, 108, 111)])]},
    ),
    "a token skipped": (
        "token order",
        {"asks": [ask(chunks=[at(0.1, 0, 104), at(0.5, 2, 108, 108, 111)])]},
    ),
    "another token": ("golden text", {"asks": [ask(chunks=[at(0.1, 0, 104, 102, 108, 108, 111)])]}),
    "another token in a part of an answer": (
        "golden text",
        {"asks": [ask(**UNFINISHED, end=End.LEFT, chunks=[at(0.1, 0, 105)])]},
    ),
    "an answer that is too short": ("golden text", {"asks": [ask(golden=[*GOLDEN, 33])]}),
    "tokens billed to the client that were not sent": (
        "tokens billed",
        {"asks": [ask(usage=Usage(7, 6))]},
    ),
    "an answer without usage": ("tokens billed", {"asks": [ask(usage=None)]}),
    "tokens sent that nobody recorded": (
        "tokens billed",
        {"logs": {"coordinator-0": coordinator_log(num_output_tokens=4)}},
    ),
    "fewer tokens recorded than a client who left has read": (
        "tokens billed",
        {
            "asks": [ask(**UNFINISHED, end=End.LEFT)],
            "logs": {"coordinator-0": coordinator_log(outcome=Outcome.ABORTED, num_output_tokens=2)},
        },
    ),
    "a block held": (
        "nothing held",
        {"snapshots": [snapshot(worker_snapshot("decode-1", num_used_blocks=3))]},
    ),
    "a promise held": (
        "nothing held",
        {"snapshots": [snapshot(worker_snapshot("decode-1", num_reserved_blocks=3))]},
    ),
    "nobody looked": ("nothing held", {"snapshots": []}),
    "phases that are too short": (
        "phases add up",
        {"logs": {"coordinator-0": coordinator_log(phases=PhaseTimes(queue_s=0.02, decode_s=0.46))}},
    ),
    "phases longer than the client waited": (
        "phases add up",
        {"asks": [ask(phases=msgspec.structs.replace(PHASES, decode_s=0.33))]},
    ),
    "an error without a code": ("error codes", {"asks": [ask(), ask("r2", **REFUSED)]}),
    "an error with a code of its own": (
        "error codes",
        {"asks": [ask(), ask("r2", **REFUSED, error=ErrorReport(code="oops", message="?"))]},
    ),
    "a prompt held past its lease": (
        "leases",
        # Its one leg ended at 5.1 s: 12 s later the lease of 5 s is long over.
        {
            "snapshots": [
                snapshot(worker_snapshot("prefill-1", num_used_blocks=1), at_s=17.1, is_quiet=False),
                snapshot(),
            ]
        },
    ),
    "queued past the deadline": (
        "phase deadlines",
        # Accepted, and sent to workers only when 12 s were over: 10 s are allowed, and 2 s of slack.
        {
            "logs": {
                "coordinator-0": Log("coordinator")
                .say(0.0, "coordinator ready boot_id=abc pid=1")
                .say(5.0, "request accepted request_id=r1 num_prompt_tokens=7 max_tokens=5")
                .say(17.1, "attempt started request_id=r1 handoff_id=h1")
                .finishes(18.0, "r1", "h1", report(phases=PhaseTimes(queue_s=12.1, decode_s=0.9)), 13.0)
            },
            "asks": [ask(ended_s=START_S + 18.1)],
        },
    ),
    "handed over past the deadline": (
        "phase deadlines",
        {
            "logs": {"coordinator-0": coordinator_log(phases=PhaseTimes(handoff_s=15.1))},
            "asks": [ask(phases=None)],
        },
    ),
    "a client that heard nothing for longer than all deadlines": (
        "phase deadlines",
        # 10 + 2 * (10 + 10 + 10 + 3) + 2 = 78
        {"asks": [ask(**UNFINISHED | {"end": End.HUNG}, ended_s=START_S + 5.5 + 78.1)]},
    ),
}


@pytest.mark.parametrize("case", PLANTED)
def test_a_planted_violation_is_found_by_its_rule(tmp_path: Path, case: str):
    rule, run = PLANTED[case]
    found = check(read_run(write_run(tmp_path, **run)))
    assert rule in {violation.rule for violation in found}


def test_every_rule_has_its_planted_violation():
    assert {rule for rule, _ in PLANTED.values()} == set(RULES)


def test_a_hold_within_its_lease_is_none_of_the_rules_business(tmp_path: Path):
    young = snapshot(worker_snapshot("prefill-1", num_used_blocks=1), at_s=11.0, is_quiet=False)
    assert check(read_run(write_run(tmp_path, snapshots=[young, snapshot()]))) == []


def test_the_first_hold_of_a_worker_is_no_older_than_the_worker(tmp_path: Path):
    """Told before its log has the leg's end: the two are written in one moment, by two processes."""
    again = Log("prefill").say(20.0, "worker starting worker_id=prefill-1 boot_id=b9 pid=8")
    young = snapshot(worker_snapshot("prefill-1", num_used_blocks=1), at_s=26.0, is_quiet=False)
    run = write_run(tmp_path / "young", logs={"prefill-1-1": again}, snapshots=[young, snapshot()])
    assert check(read_run(run)) == []
    old = snapshot(worker_snapshot("prefill-1", num_used_blocks=1), at_s=28.0, is_quiet=False)
    run = write_run(tmp_path / "old", logs={"prefill-1-1": again}, snapshots=[old, snapshot()])
    assert {violation.rule for violation in check(read_run(run))} == {"leases"}


def test_a_retried_request_may_queue_for_each_attempt(tmp_path: Path):
    """
    1. it is queued for 9 s of 10, its attempt fails, and it is queued for 9 s again: within the deadline
    2. after a third failure it waits for 13 s: past it
    """

    def retried(again_s: float) -> Log:
        phases = PhaseTimes(queue_s=again_s - 5.0, decode_s=1.0)
        return (
            Log("coordinator")
            .say(0.0, "coordinator ready boot_id=abc pid=1")
            .say(5.0, "request accepted request_id=r1 num_prompt_tokens=7 max_tokens=5")
            .say(14.0, "attempt started request_id=r1 handoff_id=h1")
            .say(15.0, "attempt failed request_id=r1 handoff_id=h1 state=prefilling", "warning")
            .say(again_s, "attempt started request_id=r1 handoff_id=h2")
            .finishes(again_s + 1.0, "r1", "h2", report(phases=phases), again_s - 4.0)
        )

    asks = [ask(ended_s=START_S + 30.0)]
    within = write_run(tmp_path / "within", asks, logs={"coordinator-0": retried(24.0)})
    assert check(read_run(within)) == []
    past = write_run(tmp_path / "past", asks, logs={"coordinator-0": retried(28.0)})
    assert {violation.rule for violation in check(read_run(past))} == {"phase deadlines"}


def test_the_codes_of_the_http_door_are_all_in_the_list():
    defined = {
        kind.code
        for _, kind in inspect.getmembers(http_errors, inspect.isclass)
        if issubclass(kind, ServingError) and kind.__module__ == http_errors.__name__
    }
    assert defined == HTTP_CODES


def test_the_command_says_which_rule_is_broken_and_tells_the_story(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["check", str(write_run(tmp_path / "good"))]) == 0
    told = capsys.readouterr().out
    assert "1 requests, 1 coordinators, 2 workers" in told and "BROKEN" not in told
    asks = [ask(chunks=[at(0.1, 0, 104), at(0.5, 2, 108, 108, 111)])]
    assert main(["check", str(write_run(tmp_path / "bad", asks))]) == 1
    told = capsys.readouterr().out
    assert "BROKEN  token order: 1" in told
    assert "token order: r1: token 2 came where 1 was due" in told
    assert "kv not received handoff_id=h1" in told  # the decode worker's line, in the request's story


def test_a_folder_without_a_run_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["check", str(tmp_path / "nowhere")]) == 2
    assert "is not a folder" in capsys.readouterr().err
    with pytest.raises(BrokenRun, match="holds no request"):
        read_run(write_run(tmp_path / "empty", []))
    (tmp_path / "empty" / "requests.jsonl").write_text('{"request_id": 1}\n')
    with pytest.raises(BrokenRun, match=r"requests\.jsonl:1"):
        read_run(tmp_path / "empty")
