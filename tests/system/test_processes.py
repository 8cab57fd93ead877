"""Processes that die, come back, join and leave: requests end in bounded time, nothing is left running."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from baton.launch import processes
from baton.ports import free_port, is_port_free
from tests.system.cases import random_prompt
from tests.system.conftest import REAL_WORKER
from tests.system.fleet import Fleet, Stream, wait_for

JOIN_TO_FIRST_REQUEST_S = 5.0
GONE_WITHIN_S = 6.0
"""For the engine of a worker that was killed."""

HEARTBEAT_TIMEOUT_S, QUEUE_TIMEOUT_S = 3.0, 8.0
COORDINATOR = (
    "--heartbeat-timeout-s", str(HEARTBEAT_TIMEOUT_S), "--queue-timeout-s", str(QUEUE_TIMEOUT_S),
)  # fmt: skip

SIMULATED_WORKER = ("--max-model-len", "2048", "--num-blocks", "512", "--simulated-step-s", "0.002")

TYPED = {"worker_lost", "kv_transfer_failed", "engine_failed", "phase_timeout", "no_workers"}


@pytest.fixture(scope="module")
def simulated_fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    fleet = Fleet(tmp_path_factory.mktemp("members"), engine="simulated")
    fleet.start_coordinator(*COORDINATOR)
    fleet.start_worker("prefill", "prefill-1", *SIMULATED_WORKER)
    fleet.start_worker("decode", "decode-1", *SIMULATED_WORKER)
    try:
        fleet.wait_until_ready()
        yield fleet
    finally:
        fleet.stop()


def greedy(fleet: Fleet, prompt: list[int], max_tokens: int = 8) -> Any:
    return fleet.complete(prompt, max_tokens=max_tokens, temperature=0, ignore_eos=True)


def transfer_port(fleet: Fleet, name: str) -> int:
    line = next(line for line in fleet.log(name).splitlines() if "transfer_endpoint=" in line)
    return int(line.partition("transfer_endpoint=")[2].split()[0].rpartition(":")[2])


# ── simulated: joining and leaving ───────────────────────────────────────────────────────────


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_second_worker_joins_serves_and_leaves(simulated_fleet: Fleet, role: str) -> None:
    """
    1. a worker joins a running fleet: within 5 s of being ready a request is served by it
    2. it is asked to leave while it serves: every request ends well, and it exits 0
    """
    fleet, name = simulated_fleet, f"{role}-2"
    # Slow enough to be seen at work: on a quiet machine a prompt takes it a millisecond otherwise.
    slow = ("--simulated-prefill-tokens-per-s", "400") if role == "prefill" else ()
    worker = fleet.start_worker(role, name, *SIMULATED_WORKER, *slow)
    wait_for("readiness", lambda: " worker ready " in worker.log_text(), 60.0)
    header = f"x-baton-{role}-worker"

    def crowd(num_requests: int, max_tokens: int) -> list[Any]:
        with ThreadPoolExecutor(num_requests) as threads:
            prompts = [random_prompt(50, f"{role} {number}") for number in range(num_requests)]
            return list(threads.map(lambda prompt: greedy(fleet, prompt, max_tokens), prompts))

    served_by: set[str] = set()

    def is_used() -> bool:
        served_by.update(answer.headers[header] for answer in crowd(8, 40))
        return name in served_by

    wait_for("a request served by the new worker", is_used, JOIN_TO_FIRST_REQUEST_S)
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(crowd, 16, 400)
        wait_for("work on it", lambda: fleet.workers()[name]["num_legs"], 10.0)
        worker.terminate()
        answers = running.result()
    assert [answer.status for answer in answers] == [200] * 16
    assert processes.wait_for_exit([worker], 20.0)
    assert worker.exit_status() == 0
    fleet.ended.append(fleet.members.pop(name))
    wait_for("its leaving", lambda: name not in fleet.workers(), 5.0)
    assert greedy(fleet, [1, 2, 3]).headers[header] == f"{role}-1"
    fleet.wait_until_idle()


def test_streams_of_the_only_decode_worker_wait_until_it_is_back(simulated_fleet: Fleet) -> None:
    """
    1. streams are being read; the only decode worker is killed: new requests are refused, these wait
    2. a new one with the same id joins: each stream goes on, with the text of an unbroken run
    """
    fleet = simulated_fleet
    body = {"prompt": random_prompt(40), "max_tokens": 900, "temperature": 0}
    expected = fleet.complete(**body).json["choices"][0]["text"]
    streams = [fleet.stream("/v1/completions", body) for _ in range(4)]
    try:
        texts = ["".join(read_text(stream, 3)) for stream in streams]  # the first alone is of prefill
        fleet.kill("decode-1")
        wait_for("the loss to be noticed", lambda: "decode-1" not in fleet.workers(), HEARTBEAT_TIMEOUT_S + 2)
        assert greedy(fleet, [1, 2]).error["code"] == "no_workers"
        fleet.start_worker("decode", "decode-1", *SIMULATED_WORKER)
        for text, stream in zip(texts, streams, strict=True):
            assert text + "".join(read_text(stream)) == expected
            assert stream.is_done
    finally:
        for stream in streams:
            stream.close()
    assert greedy(fleet, [1, 2]).status == 200
    fleet.wait_until_idle()


def read_text(stream: Stream, num_events: int | None = None) -> Iterator[str]:
    """Of the next events, or of all that follow."""
    for number, event in enumerate(stream, 1):
        yield event["choices"][0]["text"]
        if number == num_events:
            return


def test_a_killed_prefill_worker_costs_no_request_when_there_is_another(simulated_fleet: Fleet) -> None:
    fleet = simulated_fleet
    slow = (*SIMULATED_WORKER, "--simulated-prefill-tokens-per-s", "400")
    fleet.start_worker("prefill", "prefill-2", *slow)
    fleet.wait_until_ready()
    with ThreadPoolExecutor(12) as threads:
        prompts = [random_prompt(300, number) for number in range(12)]
        asked = [threads.submit(greedy, fleet, prompt) for prompt in prompts]
        wait_for("work on it", lambda: fleet.workers()["prefill-2"]["num_legs"], 10.0)
        fleet.kill("prefill-2")
        answers = [future.result() for future in asked]
    assert [answer.status for answer in answers] == [200] * 12
    assert any(answer.headers["x-baton-attempts"] == "2" for answer in answers)
    assert all(answer.headers["x-baton-prefill-worker"] == "prefill-1" for answer in answers if
               answer.headers["x-baton-attempts"] == "2")  # fmt: skip
    fleet.wait_until_idle()


def test_a_coordinator_that_is_killed_gets_its_workers_back(simulated_fleet: Fleet) -> None:
    fleet = simulated_fleet
    boot_ids = {name: worker["boot_id"] for name, worker in fleet.workers().items()}
    fleet.kill("coordinator")
    fleet.start_coordinator(*COORDINATOR)
    fleet.wait_until_ready()
    assert {name: worker["boot_id"] for name, worker in fleet.workers().items()} == boot_ids
    assert greedy(fleet, [1, 2]).status == 200


@pytest.mark.parametrize("role", ["prefill", "decode"])
@pytest.mark.parametrize("engine", ["simulated", "vllm"])
def test_a_taken_transfer_port_is_an_error_before_the_engine_starts(
    tmp_path: Any, model: Any, role: str, engine: str
) -> None:
    fleet = Fleet(tmp_path, engine=engine, model=model)
    with socket.socket() as taken:
        port = free_port()
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", port))
        taken.listen()
        started_s = time.monotonic()
        worker = fleet.start_worker(role, "late", "--transfer-port", str(port))
        try:
            assert processes.wait_for_exit([worker], 20.0)
            assert worker.exit_status() == 1
            assert f"port {port} on 127.0.0.1 is taken" in worker.log_text()
            assert "engine starting" not in worker.log_text()
            assert time.monotonic() - started_s < 15.0
        finally:
            fleet.stop()


# ── real engines ─────────────────────────────────────────────────────────────────────────────


def _end_of(fleet: Fleet, prompt: list[int]) -> tuple[str, float]:
    """("answered" or an error's code, when)"""
    answer = greedy(fleet, prompt, 900)
    return "answered" if answer.status == 200 else answer.error["code"], time.monotonic()


@pytest.mark.parametrize("role", ["decode", "prefill"])
def test_a_killed_worker_leaves_no_engine_and_is_replaced(
    start_real_fleet: Callable[..., Fleet], role: str
) -> None:
    """
    1. requests run; one worker is killed: its engine's processes end and its transfer port is free again
    2. every request ends, answered or with a typed error, soon after the coordinator has noticed
    3. a worker with the same id joins and serves within 5 s of being ready; the other was never restarted
    """
    fleet = start_real_fleet(coordinator=COORDINATOR)
    fleet.wait_until_idle(40.0)
    name, other = f"{role}-1", "prefill-1" if role == "decode" else "decode-1"
    golden = greedy(fleet, random_prompt(70, "golden"))
    other_boot_id = fleet.workers()[other]["boot_id"]
    port = transfer_port(fleet, name)
    with ThreadPoolExecutor(6) as threads:
        asked = [threads.submit(_end_of, fleet, random_prompt(90, number)) for number in range(6)]
        wait_for("tokens", lambda: fleet.workers()["decode-1"]["load"]["num_running"] >= 3, 30.0)
        killed = fleet.kill(name)
        killed_s = time.monotonic()
        assert processes.wait_until_empty([killed], GONE_WITHIN_S), killed.members()
        wait_for("the transfer port", lambda: is_port_free("127.0.0.1", port), 2.0)
        for code, ended_s in [future.result() for future in asked]:
            assert code == "answered" or code in TYPED
            if code != "answered":
                # What had no token of the lost worker yet waits for another one, for so long.
                assert ended_s - killed_s < HEARTBEAT_TIMEOUT_S + QUEUE_TIMEOUT_S + 5.0
    worker = fleet.start_worker(role, name, *REAL_WORKER)
    wait_for("readiness", lambda: " worker ready " in worker.log_text(), 120.0)
    ready_s = time.monotonic()
    again = wait_for("an answer", lambda: _if_served(fleet), JOIN_TO_FIRST_REQUEST_S)
    assert time.monotonic() - ready_s < JOIN_TO_FIRST_REQUEST_S
    assert again["choices"] == golden.json["choices"]
    assert fleet.workers()[other]["boot_id"] == other_boot_id
    fleet.wait_until_idle(40.0)  # KV that the killed decode worker did not fetch is held for its lease


def _if_served(fleet: Fleet) -> Any:
    answer = greedy(fleet, random_prompt(70, "golden"))
    return answer.json if answer.status == 200 else None


def test_a_dead_engine_ends_its_worker(start_real_fleet: Callable[..., Fleet]) -> None:
    """The engine's process dies, not the worker's: the worker says so, exits 1, and requests hear of it."""
    fleet = start_real_fleet(coordinator=COORDINATOR)
    fleet.wait_until_idle(40.0)
    decode = fleet.members["decode-1"]
    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(_end_of, fleet, random_prompt(50, "dying"))
        wait_for("tokens", lambda: fleet.workers()["decode-1"]["load"]["num_running"], 30.0)
        engines = [pid for pid in decode.members() if pid != decode.pid]
        fleet.send_signal(engines, signal.SIGKILL)
        code, _ = asked.result()
    assert code in TYPED
    assert processes.wait_for_exit([decode], 20.0)
    assert decode.exit_status() == 1
    assert "engine died" in decode.log_text()
    fleet.ended.append(fleet.members.pop("decode-1"))
    fleet.start_worker("decode", "decode-1", *REAL_WORKER)
    fleet.wait_until_ready()
    assert greedy(fleet, [5, 6, 7]).status == 200
