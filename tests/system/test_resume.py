"""Workers killed in mid-answer: clients read on, and what they read is an unbroken run's.

users.md pains 9 (a pair's link dies, others go on) and 19 (a stream outlives its decode worker).
Simulated engines invent each token from all tokens before it, so one that is lost, repeated or given to the
wrong request changes everything after it.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest

from baton.client import BatonClient
from baton.launch.processes import RecordedProcess
from tests.system.cases import random_prompt
from tests.system.fleet import Answer, Fleet, wait_for

COORDINATOR = (
    "--heartbeat-timeout-s", "30", "--queue-timeout-s", "30", "--prefill-policy", "random",
)  # fmt: skip
"""Nobody is found to be lost by his silence; every pair is used."""
WORKER = ("--max-model-len", "4096", "--num-blocks", "2048", "--simulated-step-s", "0.005")

NUM_TOKENS = 400
"""Two seconds of steps: enough to be killed in."""


@pytest.fixture(scope="module")
def two_pairs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """2P2D."""
    fleet = Fleet(tmp_path_factory.mktemp("resume"), engine="simulated")
    fleet.start_coordinator(*COORDINATOR)
    for role in ("prefill", "decode"):
        for number in (1, 2):
            fleet.start_worker(role, f"{role}-{number}", *WORKER)
    try:
        fleet.wait_until_ready()
        yield fleet
    finally:
        fleet.stop()


@pytest.fixture
def fleet(two_pairs: Fleet) -> Fleet:
    """All four workers are there."""
    missing = [f"{role}-{n}" for role in ("prefill", "decode") for n in (1, 2)
               if f"{role}-{n}" not in two_pairs.members]  # fmt: skip
    for name in missing:
        two_pairs.start_worker(name.partition("-")[0], name, *WORKER)
    two_pairs.wait_until_ready()
    return two_pairs


def body(number: int, **more: Any) -> dict[str, Any]:
    return {
        "prompt": random_prompt(50, f"resume {number}"), "max_tokens": NUM_TOKENS, "temperature": 0,
        "ignore_eos": True, "return_token_ids": True,
    } | more  # fmt: skip


def token_ids(answer: Any) -> list[list[int]]:
    """Of each choice."""
    return [choice["token_ids"] for choice in answer["choices"]]


def usage(answer: Any) -> tuple[int, int]:
    """Without what was cached: the first run of a prompt is no measure of the second."""
    return answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]


def running_on(fleet: Fleet, name: str) -> int:
    running: int = fleet.workers()[name]["load"]["num_running"]
    return running


def num_legs(fleet: Fleet, name: str) -> int:
    legs: int = fleet.workers()[name]["num_legs"]
    return legs


def is_gone(fleet: Fleet, name: str) -> bool:
    return name not in fleet.workers()


def has_logged(worker: RecordedProcess, what: str) -> bool:
    return what in worker.log_text()


def metric(fleet: Fleet, name: str) -> float:
    lines = fleet.ask("GET", "/metrics").body.decode().splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith(f"{name} "))


def test_pain_19_a_killed_decode_worker_costs_no_token_of_any_stream(fleet: Fleet) -> None:
    """
    1. streams run on both decode workers; one worker is killed
    2. every stream ends with the tokens and the usage of an unbroken run, none lost, none repeated
    3. those that were moved say so, and the metrics count them
    """
    bodies = [body(number) for number in range(8)]
    with ThreadPoolExecutor(len(bodies)) as threads:
        expected = list(threads.map(lambda wanted: fleet.complete(**wanted).json, bodies))
    before = metric(fleet, "baton_resumes_total")

    def read(wanted: dict[str, Any]) -> tuple[list[int], Any]:
        stream = fleet.stream("/v1/completions", wanted | {"stream_options": {"include_usage": True}})
        try:
            *events, last = stream
            assert stream.is_done, last
            return [t for event in events for t in event["choices"][0]["token_ids"]], last
        finally:
            stream.close()

    with ThreadPoolExecutor(len(bodies)) as threads:
        running = [threads.submit(read, wanted) for wanted in bodies]
        wait_for("streams on both", lambda: min(running_on(fleet, f"decode-{n}") for n in (1, 2)) > 1, 20.0)
        fleet.kill("decode-1")
        ended = [future.result() for future in running]
    assert [tokens for tokens, _ in ended] == [token_ids(answer)[0] for answer in expected]
    assert [usage(last) for _, last in ended] == [usage(answer) for answer in expected]
    num_resumes = sum(last["baton"]["resumes"] for _, last in ended)
    assert num_resumes >= 2
    assert metric(fleet, "baton_resumes_total") - before == num_resumes
    fleet.wait_until_idle()


def test_pain_19_whole_answers_choices_logprobs_and_both_doors(fleet: Fleet) -> None:
    """Whatever way a client asks; a decode worker is killed while all of these run."""
    asked: dict[str, dict[str, Any]] = {
        "whole": body(100),
        "choices": body(101, n=3),
        "logprobs": body(102, logprobs=2),
        "stop": body(103, stop=["qqq"], ignore_eos=False),
        "prompt logprobs": body(104, prompt_logprobs=1),
    }
    with BatonClient(fleet.client_address) as client, ThreadPoolExecutor(len(asked) + 1) as threads:
        answered = threads.map(lambda wanted: fleet.complete(**wanted).json, asked.values())
        expected = dict(zip(asked, answered, strict=True))
        running = {name: threads.submit(fleet.complete, **wanted) for name, wanted in asked.items()}
        zmq = threads.submit(lambda: list(client.stream(body(100)["prompt"], max_tokens=NUM_TOKENS)))
        wait_for("work on it", lambda: running_on(fleet, "decode-2") >= 3, 20.0)
        fleet.kill("decode-2")
        answers = {name: future.result() for name, future in running.items()}
        deltas = zmq.result()
    num_resumes = 0
    for name, answer in answers.items():
        assert answer.status == 200, answer.json
        for got, wanted in zip(answer.json["choices"], expected[name]["choices"], strict=True):
            assert got == wanted, name
        assert usage(answer.json) == usage(expected[name]), name
        num_resumes += int(answer.headers["x-baton-resumes"])
    assert [t for delta in deltas for t in delta.token_ids] == token_ids(expected["whole"])[0]
    assert num_resumes >= 2
    fleet.wait_until_idle()


def test_pain_19_what_cannot_be_moved_is_refused_by_name(fleet: Fleet) -> None:
    streams = [fleet.stream("/v1/completions", body(n, seed=n, temperature=1.0)) for n in range(4)]
    try:
        for stream in streams:
            next(iter(stream))
        fleet.kill("decode-1")
        lasts = [list(stream)[-1] for stream in streams]
    finally:
        for stream in streams:
            stream.close()
    errors = [last["error"] for last in lasts if "error" in last]
    assert 0 < len(errors) < 4
    assert {(error["code"], error["worker_id"]) for error in errors} == {("cannot_resume", "decode-1")}
    assert all("it cannot go on elsewhere: seeded sampling" in error["message"] for error in errors)
    fleet.wait_until_idle()


def test_pain_8_a_killed_worker_is_missed_at_once_and_one_on_its_address_serves_without_any_restart(
    fleet: Fleet,
) -> None:
    """
    1. under load each worker in turn is killed: its connection ends, and what waited for it is moved, long
       before its silence would tell; no request fails
    2. another process takes its name and its KV address, and is given work within 10 s of being ready;
       nobody else was restarted
    """
    boot_ids = {name: worker["boot_id"] for name, worker in fleet.workers().items()}
    address = {name: worker["transfer_endpoint"] for name, worker in fleet.workers().items()}
    is_over = False
    missed_s: list[float] = []

    def load(number: int) -> list[int]:
        statuses: list[int] = []
        while not is_over:
            statuses.append(fleet.complete(**body(1000 + len(statuses) * 8 + number, max_tokens=60)).status)
        return statuses

    with ThreadPoolExecutor(8) as threads:
        running = [threads.submit(load, number) for number in range(8)]
        try:
            for name in sorted(boot_ids):
                wait_for(f"work on {name}", partial(num_legs, fleet, name), 20.0)
                fleet.kill(name)
                killed_s = time.monotonic()
                wait_for("the loss", partial(is_gone, fleet, name), 10.0)
                missed_s.append(time.monotonic() - killed_s)
                port = address[name].rpartition(":")[2]
                worker = fleet.start_worker(name.partition("-")[0], name, *WORKER, "--transfer-port", port)
                wait_for("readiness", partial(has_logged, worker, " worker ready "), 60.0)
                wait_for("work", partial(num_legs, fleet, name), 10.0)
        finally:
            is_over = True
        statuses = [status for future in running for status in future.result()]
    assert set(statuses) == {200}
    assert statistics.median(missed_s) < 1.0, missed_s
    now = fleet.workers()
    assert {name for name in boot_ids if now[name]["boot_id"] == boot_ids[name]} == set()  # each once
    assert {name: worker["transfer_endpoint"] for name, worker in now.items()} == address
    fleet.wait_until_idle()


def test_pain_9_a_broken_pair_is_fenced_and_the_rest_of_the_fleet_goes_on(fleet: Fleet) -> None:
    """
    1. decode-1 gets no KV from prefill-2 any more; each works with the others
    2. three requests find out, each is answered all the same; nobody else is sent over that pair, although
       all four workers go on serving
    3. the metrics name the pair; its end is that of a process: a restart opens it
    """
    fleet.kill("decode-1")
    wait_for("the loss", partial(is_gone, fleet, "decode-1"), 10.0)
    fault = ("--simulated-fault", "transfer:fail:peer=prefill-2")
    worker = fleet.start_worker("decode", "decode-1", *WORKER, *fault)
    wait_for("readiness", partial(has_logged, worker, " worker ready "), 60.0)
    broken = ("prefill-2", "decode-1")
    numbers = itertools.count(2000)

    def serve() -> Answer:
        answer = fleet.complete(**body(next(numbers), max_tokens=3))
        assert answer.status == 200
        return answer

    def is_computed_again() -> bool:
        return serve().headers["x-baton-attempts"] == "2"

    for _ in range(3):
        wait_for("a request over the broken pair", is_computed_again, 60.0)
    answers = [serve() for _ in range(40)]
    assert {answer.headers["x-baton-attempts"] for answer in answers} == {"1"}
    pairs = {
        tuple(answer.headers[f"x-baton-{role}-worker"] for role in ("prefill", "decode"))
        for answer in answers
    }
    assert pairs == {(f"prefill-{p}", f"decode-{d}") for p in (1, 2) for d in (1, 2)} - {broken}
    (bad,) = fleet.snapshot()["bad_pairs"]
    assert (bad["prefill_worker"], bad["decode_worker"], bad["num_failures"]) == ("prefill-2", "decode-1", 3)
    assert metric(fleet, 'baton_pair_handoff_failures{pair="prefill-2 > decode-1"}') == 3
    fleet.kill("decode-1")
    wait_for("the loss", partial(is_gone, fleet, "decode-1"), 10.0)
    assert fleet.snapshot()["bad_pairs"] == []
