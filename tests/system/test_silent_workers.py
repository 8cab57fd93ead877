"""users' pain 3: a worker that accepts and never answers. The client hears in time where."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.system.cases import random_prompt
from tests.system.fleet import Fleet, wait_for

LIMIT_S = 1.0
"""Of each phase. The hand-off's is shorter than the lease of the KV that it waits for."""
LATE_S, SLACK_S = 1.0, 1.0
"""By so much an error may be late, and a busy machine later."""

LIMITS = [
    flag
    for phase in ("queue", "prefill", "handoff", "decode-stall")
    for flag in (f"--{phase}-timeout-s", str(LIMIT_S))
]
WORKER = (
    "--max-model-len",
    "2048",
    "--num-blocks",
    "512",
    "--simulated-step-s",
    "0.002",
    "--max-batch-size",
    "1",
)

SILENT_PREFILL = ("accept:ignore:nth=1", "prefill:stall:nth=1")
SILENT_DECODE = {
    "pull": ("transfer:stall:nth=1", "first:stall:nth=2", "token:stall:nth=2,after=5"),
    "stream": ("transfer:stall:nth=3", "first:stall:nth=4", "token:stall:nth=4,after=5"),
}
"""A rule counts the legs that no other has met. The first two prompts are never computed (where KV is
streamed they have decode legs all the same); the next three are, and are never continued."""

STORY = [
    ("prefilling", "prefill-1"), ("prefilling", "prefill-1"), ("handing_off", "decode-1"),
    ("handing_off", "decode-1"), ("decoding", "decode-1"),
]  # fmt: skip


@pytest.fixture
def transfer() -> str:
    return "stream"


@pytest.fixture
def fleet(tmp_path: Any, transfer: str) -> Iterator[Fleet]:
    fleet = Fleet(tmp_path, engine="simulated")
    fleet.start_coordinator(*LIMITS, "--max-attempts", "1", "--no-join-test")
    for role, faults in (("prefill", SILENT_PREFILL), ("decode", SILENT_DECODE[transfer])):
        flags = [flag for fault in faults for flag in ("--simulated-fault", fault)]
        lease = ("--kv-lease-s", "3") if role == "prefill" else ()
        fleet.start_worker(role, f"{role}-1", *WORKER, "--transfer", transfer, *flags, *lease)
    try:
        fleet.wait_until_ready()
        yield fleet
    finally:
        fleet.stop()


def in_flight(fleet: Fleet) -> float:
    found = re.search(r"^baton_requests_in_flight (\S+)$", fleet.ask("GET", "/metrics").body.decode(), re.M)
    assert found is not None
    return float(found[1])


@pytest.mark.parametrize("transfer", list(SILENT_DECODE))
def test_silence_in_any_phase_is_a_504_that_names_it(fleet: Fleet) -> None:
    """
    1. five requests, each of which meets a worker that says nothing more: in prefill (accepted and forgotten;
       begun and stuck), in the hand-off (KV never comes; the first token never comes), after five tokens
    2. each ends within its phase's limit and a second, with 504 `phase_timeout`, phase and worker; the
       last one has begun to stream, so its error is its last event
    3. nothing is in flight afterwards, and the next request is served
    """
    for number, (phase, worker_id) in enumerate(STORY):
        prompt = random_prompt(40, number)
        asked_s = time.monotonic()
        if phase == "decoding":
            body = {"prompt": prompt, "max_tokens": 50, "ignore_eos": True}
            stream = fleet.stream("/v1/completions", body)
            with contextlib.closing(stream):
                *tokens, last = stream
            assert stream.is_done and len(tokens) >= 5
            error = last["error"]
        else:
            # Seeded: the first token is the decode worker's.
            answer = fleet.complete(prompt, max_tokens=50, ignore_eos=True, seed=1, temperature=1.0)
            assert answer.status == 504, answer.body
            error = answer.error
        took_s = time.monotonic() - asked_s
        assert (error["code"], error["phase"], error["worker_id"]) == ("phase_timeout", phase, worker_id)
        assert f"no progress in {phase} for 1 s" in error["message"]
        assert LIMIT_S <= took_s <= LIMIT_S + LATE_S + SLACK_S, f"{phase} on {worker_id}: {took_s:.2f} s"
        assert in_flight(fleet) == 0
    wait_for("service", lambda: fleet.complete([1, 2, 3], max_tokens=4).status == 200, 10.0)


def test_silence_in_line_is_a_504_of_the_line(fleet: Fleet) -> None:
    """The one before it keeps the only place of the decode worker; no worker is to blame."""
    first = {"prompt": random_prompt(40), "max_tokens": 1900, "ignore_eos": True}
    for number in range(len(STORY)):  # what is wrong with the workers is over with these
        fleet.complete(random_prompt(40, number), max_tokens=50, ignore_eos=True, seed=1, temperature=1.0)
    stream = fleet.stream("/v1/completions", first)
    try:
        next(iter(stream))
        asked_s = time.monotonic()
        answer = fleet.complete([1, 2, 3], max_tokens=4)
        assert time.monotonic() - asked_s <= LIMIT_S + LATE_S + SLACK_S
        assert (answer.status, answer.error["code"]) == (504, "phase_timeout")
        assert answer.error["phase"] == "queued" and "worker_id" not in answer.error
    finally:
        stream.close()
    wait_for("nothing in flight", lambda: in_flight(fleet) == 0, 5.0)
