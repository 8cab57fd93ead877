"""Clients that leave and prefill workers that die, while KV is streamed and while it is pulled, on real
engines. Requests that want logprobs of their prompt are pulled also where all others are streamed, so one
fleet shows both."""

from __future__ import annotations

import asyncio
import contextlib
import random
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from baton.client import AsyncBatonClient
from baton.launch import processes
from baton.ports import free_port
from tests.system.cases import random_prompt
from tests.system.conftest import REAL_WORKER
from tests.system.fleet import Fleet, elapsed, wait_for
from tests.system.test_disconnect import begin

CHUNK = 64
MAX_LEN = 8192
LEASE_S = 5
HEARTBEAT_TIMEOUT_S = 3.0
BACK_WITHIN_S = LEASE_S + 5.0
SERVES_WITHIN_S = 10.0
"""From the registration of a restarted worker to the first request it has served."""

NUM_KILLS = 1
"""Each costs the start of an engine; test_repeated_faults.py has two hundred, scripts/chaos.sh real more."""
NUM_ABORTS = 60

PREFILL = (
    "--transfer", "stream", "--transfer-port", str(free_port()), "--kv-lease-s", str(LEASE_S),
    "--max-num-batched-tokens", str(CHUNK), "--max-model-len", str(MAX_LEN),
)  # fmt: skip
DECODE = ("--transfer", "stream", "--max-model-len", str(MAX_LEN))
COORDINATOR = ("--heartbeat-timeout-s", str(HEARTBEAT_TIMEOUT_S), "--queue-timeout-s", "60")

TYPED = {"worker_lost", "kv_transfer_failed", "engine_failed", "phase_timeout", "no_workers"}

WAYS: dict[str, dict[str, Any]] = {"streamed": {}, "pulled": {"prompt_logprobs": 0}}

GREEDY = {"temperature": 0, "ignore_eos": True}


@pytest.fixture
def fleet(start_real_fleet: Callable[..., Fleet]) -> Fleet:
    fleet: Fleet = start_real_fleet(coordinator=COORDINATOR, prefill=PREFILL, decode=DECODE)
    fleet.wait_until_idle(2.0 * LEASE_S)
    return fleet


def load(fleet: Fleet, name: str) -> dict[str, Any]:
    counters: dict[str, Any] = fleet.workers()[name]["load"]
    return counters


def is_free(fleet: Fleet, name: str) -> bool:
    worker = fleet.workers()[name]
    return bool(worker["load"]["num_free_blocks"] == worker["capacity"]["num_blocks"])


def body(num_tokens: int, seed: object, way: str, max_tokens: int = 16) -> dict[str, Any]:
    return {"prompt": random_prompt(num_tokens, seed), "max_tokens": max_tokens, **GREEDY, **WAYS[way]}


def check_full_capacity(fleet: Fleet, seed: object) -> None:
    """Nobody holds anything, and the longest possible request is admitted and answered."""
    fleet.wait_until_idle(BACK_WITHIN_S)
    answer = fleet.ask("POST", "/v1/completions", body(MAX_LEN - 8, seed, "streamed", max_tokens=8))
    assert answer.status == 200, answer.body
    assert answer.json["usage"]["completion_tokens"] == 8
    fleet.wait_until_idle(BACK_WITHIN_S)


@pytest.mark.parametrize("way", WAYS)
def test_a_client_that_leaves_ends_its_prefill_at_the_next_chunk(fleet: Fleet, way: str) -> None:
    """
    dynamo#13691: the client is gone before the first token, a prefill of many thousand tokens goes on
    1. a prompt of more than a hundred chunks is being computed; its client leaves after twenty of them
    2. the prefill worker is idle within two seconds and has computed two chunks more at most
    3. a short request then has the same time to its first token as before
    """

    def short(number: int) -> float:
        started_s = time.monotonic()
        assert fleet.complete(random_prompt(20, f"{way} {number}"), max_tokens=1).status == 200
        return time.monotonic() - started_s

    usual_s = statistics.median(short(number) for number in range(5))
    before = load(fleet, "prefill-1")["num_prefill_tokens_done"]

    def num_done() -> int:
        """Tokens of the long prompt."""
        done: int = load(fleet, "prefill-1")["num_prefill_tokens_done"] - before
        return done

    with contextlib.closing(begin(fleet, body(MAX_LEN - 20, "left", way))):
        wait_for("prefill", lambda: num_done() >= 20 * CHUNK, 30.0)
    # Counted once it has left: what is computed while this process waits for its turn is nobody's fault.
    done_at_close = num_done()
    assert 0 < done_at_close < MAX_LEN - 20 - 2 * CHUNK, "it was over before the client left"
    left_s = time.monotonic()
    wait_for("an idle prefill worker", lambda: not load(fleet, "prefill-1")["num_running"], 2.0)
    after_s = short(99)
    done = num_done() - 20  # without those of the short one
    # One chunk was being computed, one may have been planned, and what was read lags by one step.
    num_late_chunks = (done - done_at_close) / CHUNK
    print(f"idle {time.monotonic() - left_s:.2f} s after, {num_late_chunks:.1f} chunks after the client left")
    assert num_late_chunks <= 3
    assert after_s < 3 * usual_s + 1.0, f"{usual_s:.3f} s before, {after_s:.3f} s after"
    fleet.wait_until_idle(BACK_WITHIN_S)


def test_a_client_hears_the_end_while_its_blocks_are_in_quarantine(fleet: Fleet) -> None:
    """
    1. a prompt is streamed; the prefill worker stands still, so it cannot agree to write no more
    2. the client gives up: it hears the end at once, while the decode worker keeps the blocks
    3. the prefill worker goes on and answers: the blocks are free
    """

    async def give_up() -> float:
        async with AsyncBatonClient(fleet.client_address, timeout_s=30) as client:
            stream = client.submit(random_prompt(4000, "quarantine"), max_tokens=8, ignore_eos=True)
            await asyncio.to_thread(wait_for, "reserved blocks", lambda: not is_free(fleet, "decode-1"), 20.0)
            fleet.pause("prefill-1")
            aborted_s = time.monotonic()
            stream.abort()
            async for _ in stream:
                pass
            assert stream.report is not None
            assert stream.report.outcome.value == "aborted"
            return time.monotonic() - aborted_s

    try:
        took_s = asyncio.run(asyncio.wait_for(give_up(), 30.0))
        wait_for("the news", elapsed(0.8), 5.0)
        assert not is_free(fleet, "decode-1"), "blocks were freed that may still be written to"
    finally:
        fleet.resume("prefill-1")
    assert took_s < 1.0
    check_full_capacity(fleet, "after quarantine")


def test_sixty_aborts_at_random_points_leave_capacity_unchanged(fleet: Fleet) -> None:
    """sglang#9266, #9817: a slot leaks with each abort until nothing is accepted."""
    dice = random.Random(13)
    check_full_capacity(fleet, "before the aborts")
    crowd: list[Any] = []
    for number in range(NUM_ABORTS):
        way = dice.choice(list(WAYS))
        crowd.append(begin(fleet, body(dice.choice([40, 300, 1500]), f"abort {number}", way, 100)))
        if len(crowd) > 4:
            crowd.pop(dice.randrange(len(crowd))).close()
        wait_for("the moment", elapsed(dice.expovariate(10.0)), 5.0)
    for connection in crowd:
        connection.close()
    check_full_capacity(fleet, "after the aborts")


class Load:
    """Clients that never stop asking. Every request has to end, well or with a typed error."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._is_over = threading.Event()
        self.ends: list[tuple[float, str]] = []
        self._threads = [threading.Thread(target=self._ask, args=(way,)) for way in WAYS for _ in range(2)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join()

    def wait_for_more(self, num_requests: int) -> None:
        goal = len(self.ends) + num_requests
        wait_for("load that is served", lambda: len(self.ends) >= goal, 60.0)

    def _ask(self, way: str) -> None:
        dice = random.Random(f"{way} {threading.get_ident()}")
        while not self._is_over.is_set():
            prompt_seed = dice.random()
            answer = self._fleet.ask(
                "POST", "/v1/completions", body(dice.choice([50, 400, 900]), prompt_seed, way)
            )
            end = "answered" if answer.status == 200 else answer.error["code"]
            self.ends.append((time.monotonic(), end))
            if end == "no_workers":
                self._is_over.wait(0.5)


def test_a_prefill_worker_is_killed_and_comes_back_on_its_address(fleet: Fleet) -> None:
    """
    vllm#46283: D's blocks are held for ever when P dies. nixl#795: a restarted P is of no use until every D
    is restarted
    1. long prompts are being streamed and pulled under load; the prefill worker is killed with -9, and half
       of the clients leave
    2. every block of the decode worker is free within the lease and 5 seconds
    3. the prefill worker is started again on the same ports: within 10 seconds of its registration it has
       handed KV to the same decode worker; what waited ends well, and the longest request is admitted
    """
    decode_boot_id = fleet.workers()["decode-1"]["boot_id"]
    golden = body(200, "golden", "streamed")
    right = fleet.ask("POST", "/v1/completions", golden).json["choices"]
    for number in range(NUM_KILLS):
        with Load(fleet) as clients, contextlib.ExitStack() as long:
            kill_under_load(fleet, number, long)
            start_again(fleet, number)
            assert fleet.ask("POST", "/v1/completions", golden).json["choices"] == right
            clients.wait_for_more(8)
        assert {end for _, end in clients.ends} <= {"answered", *TYPED}
        assert [end for _, end in clients.ends[-4:]] == ["answered"] * 4
        assert fleet.workers()["decode-1"]["boot_id"] == decode_boot_id
        check_full_capacity(fleet, f"after kill {number}")


def kill_under_load(fleet: Fleet, number: int, long: contextlib.ExitStack) -> None:
    """Until the decode worker has all its blocks back; `long` has the requests whose clients stay."""
    leaving = []
    for way in WAYS:
        leaving.append(begin(fleet, body(3000, f"leaves {number}", way)))
        long.enter_context(contextlib.closing(begin(fleet, body(3000, f"stays {number}", way))))
    wait_for("reserved blocks", lambda: not is_free(fleet, "decode-1"), 20.0)
    wait_for("the moment", elapsed(random.Random(number).uniform(0.2, 1.0)), 5.0)
    killed = fleet.kill("prefill-1")
    killed_s = time.monotonic()
    for connection in leaving:
        connection.close()
    wait_for("free blocks", lambda: is_free(fleet, "decode-1"), BACK_WITHIN_S)
    print(f"decode blocks free {time.monotonic() - killed_s:.1f} s after the kill")
    assert processes.wait_until_empty([killed], 6.0)


def start_again(fleet: Fleet, number: int) -> None:
    """Until the new process has served its first hand-off."""
    worker = fleet.start_worker("prefill", "prefill-1", *REAL_WORKER, *PREFILL)
    wait_for("registration", lambda: " worker ready " in worker.log_text(), 120.0)
    ready_s = time.monotonic()
    fresh = body(200, f"fresh {number}", "streamed")
    wait_for("a hand-off", lambda: is_handed_off(fleet, fresh), SERVES_WITHIN_S)
    print(f"served {time.monotonic() - ready_s:.1f} s after it registered")


def is_handed_off(fleet: Fleet, request: dict[str, Any]) -> bool:
    answer = fleet.ask("POST", "/v1/completions", request)
    return answer.status == 200 and int(answer.headers["x-baton-kv-bytes"]) > 0
