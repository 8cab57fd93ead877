"""The same mishap hundreds of times, on simulated engines: whatever leaks a little each time shows. Every
other request is pulled, because it wants its prompt's logprobs, the others are streamed."""

from __future__ import annotations

import contextlib
import random
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest

from baton.launch import processes
from tests.system.cases import random_prompt
from tests.system.fleet import Answer, Fleet, elapsed, wait_for
from tests.system.test_disconnect import begin

HEARTBEAT_TIMEOUT_S = 2.0
LEASE_S = 5
BACK_WITHIN_S = LEASE_S + 5.0
SERVES_WITHIN_S = 10.0
FREED_AT_ONCE_S = 4.0
"""Well below the lease: somebody has let go."""

NUM_ROUNDS, NUM_PREFILL_WORKERS = 8, 25
NUM_REFUSED = NUM_IN_THE_GAP = 500
NUM_ABORTS = 1000

BLOCK = 32
NUM_BLOCKS = 2048
MAX_LEN = 2048
NUM_PROBES = NUM_BLOCKS * BLOCK // 1500 + 2
WORKER = (
    "--max-model-len", str(MAX_LEN), "--num-blocks", str(NUM_BLOCKS), "--simulated-step-s", "0.02",
    "--transfer", "stream",
)  # fmt: skip
PREFILL = (*WORKER, "--simulated-prefill-tokens-per-s", "16000", "--kv-lease-s", str(LEASE_S))
TRANSFER_S = 0.1

TYPED = {"worker_lost", "kv_transfer_failed", "engine_failed", "phase_timeout", "no_workers"}


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    fleet = Fleet(tmp_path_factory.mktemp("repeated"), engine="simulated")
    fleet.start_coordinator("--heartbeat-timeout-s", str(HEARTBEAT_TIMEOUT_S))
    fleet.start_worker("decode", "decode-1", *WORKER)
    fleet.start_worker("prefill", "prefill-1", *PREFILL, "--simulated-transfer-s", str(TRANSFER_S))
    try:
        fleet.wait_until_ready()
        yield fleet
    finally:
        fleet.stop()


def greedy(num_tokens: int, seed: object, max_tokens: int = 8, *, is_pulled: bool = False) -> dict[str, Any]:
    """KV of the others is streamed."""
    body = {"prompt": random_prompt(num_tokens, seed), "max_tokens": max_tokens, "temperature": 0}
    return body | {"ignore_eos": True} | ({"prompt_logprobs": 0} if is_pulled else {})


def ask(fleet: Fleet, body: dict[str, Any]) -> Answer:
    return fleet.ask("POST", "/v1/completions", body)


def seconds_of_a_request(fleet: Fleet, seed: object) -> float:
    started_s = time.monotonic()
    assert ask(fleet, greedy(40, seed)).status == 200
    return time.monotonic() - started_s


def num_that_fit(fleet: Fleet, seed: object) -> int:
    """How many large answers the decode worker generates at the same time."""
    with contextlib.ExitStack() as clients:
        for number in range(NUM_PROBES):
            body = greedy(1500, f"probe {seed} {number}", 540)
            clients.enter_context(contextlib.closing(begin(fleet, body)))
        wait_for("a full decode worker", lambda: is_full(fleet), 30.0)
        num_running = int(fleet.workers()["decode-1"]["num_legs"])
    fleet.wait_until_idle(FREED_AT_ONCE_S)
    return num_running


def is_full(fleet: Fleet) -> bool:
    """All probes are here, and those that wait do not wait for the prefill worker."""
    snapshot = fleet.snapshot()
    legs = [worker["num_legs"] for worker in snapshot["workers"] if worker["role"] == "prefill"]
    return snapshot["num_requests"] == NUM_PROBES and snapshot["num_queued"] > 0 and not any(legs)


def test_requests_that_only_the_decode_worker_refuses(fleet: Fleet) -> None:
    """
    vllm#41269, llm-d#1138: D rejects what P has computed, and P's blocks are stranded
    1. 500 prompts are refused by the decode worker, which cannot do structured output: after they have been
       computed where KV is pulled, meanwhile where it is streamed
    2. every client hears why; the prefill worker is empty well before any lease ends
    """

    def refused(number: int) -> Answer:
        return ask(
            fleet,
            {
                **greedy(64, f"bad {number}", is_pulled=number % 2 == 0),
                "structured_outputs": {"regex": "[a-c]+"},
            },
        )

    usual_s = min(seconds_of_a_request(fleet, f"before {number}") for number in range(5))
    with ThreadPoolExecutor(32) as threads:
        answers = list(threads.map(refused, range(NUM_REFUSED)))
    assert {(answer.status, answer.error["code"]) for answer in answers} == {(400, "unsupported_feature")}
    fleet.wait_until_idle(FREED_AT_ONCE_S)
    done = fleet.workers()["prefill-1"]["load"]["num_prefill_tokens_done"]
    assert done >= NUM_REFUSED // 2 * 64, "those that are pulled were computed before they were refused"
    assert min(seconds_of_a_request(fleet, f"after {number}") for number in range(5)) < 3 * usual_s + 0.05


def test_clients_that_leave_between_prefill_and_decode(fleet: Fleet) -> None:
    """vllm#50425: nobody tells P that the one who should have fetched its KV is gone."""
    dice = random.Random(2)

    def leave(number: int) -> None:
        with contextlib.closing(begin(fleet, greedy(64, f"gap {number}", is_pulled=number % 2 == 0))):
            time.sleep(dice.uniform(0.0, 3 * TRANSFER_S))

    with ThreadPoolExecutor(32) as threads:
        list(threads.map(leave, range(NUM_IN_THE_GAP)))
    fleet.wait_until_idle(FREED_AT_ONCE_S)


def test_a_thousand_aborts_at_random_points_leave_capacity_unchanged(fleet: Fleet) -> None:
    """sglang#9266, #9817: a slot leaks with each abort until nothing is accepted."""
    dice = random.Random(13)
    before = num_that_fit(fleet, "before")
    assert before >= NUM_BLOCKS * BLOCK // MAX_LEN

    def leave(number: int) -> None:
        body = greedy(
            dice.choice([1, 40, 300, 1500]),
            f"abort {number}",
            dice.choice([1, 2, 100, 500]),
            is_pulled=number % 2 == 0,
        )
        with contextlib.closing(begin(fleet, body)):
            time.sleep(dice.expovariate(4.0))

    with ThreadPoolExecutor(64) as threads:
        list(threads.map(leave, range(NUM_ABORTS)))
    fleet.wait_until_idle(BACK_WITHIN_S)
    assert num_that_fit(fleet, "after") == before


def test_prefill_workers_killed_two_hundred_times(fleet: Fleet) -> None:
    """
    vllm#46283, nixl#795, eight times: a process of 25 prefill workers is killed with -9 in the middle of 50
    prompts, and started again under the same names
    1. half of the clients leave with it: the decode worker has their blocks back within lease + 5 s
    2. within 10 s of the kill a prompt is computed by the new process and handed to the same decode worker;
       the clients that stayed are answered
    3. in the end as many of the largest requests fit as in the beginning
    """
    dice = random.Random(1)
    served_s: list[float] = []
    decode_boot_id = fleet.workers()["decode-1"]["boot_id"]
    before = num_that_fit(fleet, "before kills")
    fleet.members["prefill-1"].terminate()
    wait_for("its leaving", lambda: set(fleet.workers()) == {"decode-1"}, 10.0)
    fleet.ended.append(fleet.members.pop("prefill-1"))
    start_crowd(fleet)
    with ThreadPoolExecutor(NUM_PREFILL_WORKERS) as threads:
        for round_number in range(NUM_ROUNDS):
            wait_for("the crowd", lambda: len(fleet.serving()) == NUM_PREFILL_WORKERS + 1, 60.0)
            with contextlib.ExitStack() as leaving:
                staying = []
                for number in range(NUM_PREFILL_WORKERS):
                    seed = f"{round_number} {number}"
                    leaving.enter_context(
                        contextlib.closing(begin(fleet, greedy(1200, f"leaves {seed}", 50)))
                    )
                    staying.append(threads.submit(ask, fleet, greedy(1200, f"stays {seed}", 50)))
                wait_for("work", lambda: fleet.snapshot()["num_requests"] > NUM_PREFILL_WORKERS, 20.0)
                wait_for("the moment", elapsed(dice.uniform(0.0, 0.3)), 5.0)
                fleet.kill("crowd")
                killed_s = time.monotonic()
            start_crowd(fleet)
            wait_for("a hand-off", partial(is_handed_off, fleet, round_number), 3 * SERVES_WITHIN_S)
            served_s.append(time.monotonic() - killed_s)
            ends = [future.result() for future in staying]
            assert {a.status for a in ends} <= {200, 502, 503, 504}
            assert {a.error["code"] for a in ends if a.status != 200} <= TYPED
            fleet.wait_until_idle(BACK_WITHIN_S)
    print("served", *[f"{seconds:.1f}" for seconds in served_s], "s after the kill")
    # A new process has to start, which takes what a busy machine gives it.
    assert statistics.median(served_s) < SERVES_WITHIN_S
    assert fleet.workers()["decode-1"]["boot_id"] == decode_boot_id
    crowd = fleet.members.pop("crowd")
    crowd.terminate()
    assert processes.wait_for_exit([crowd], 20.0)
    fleet.ended.append(crowd)
    fleet.start_worker("prefill", "prefill-1", *PREFILL)
    fleet.wait_until_ready()
    assert num_that_fit(fleet, "after kills") == before


def start_crowd(fleet: Fleet) -> None:
    fleet.start_worker("prefill", "crowd", *PREFILL, "--simulated-num-workers", str(NUM_PREFILL_WORKERS))


def is_handed_off(fleet: Fleet, seed: object) -> bool:
    answer = ask(fleet, greedy(300, f"fresh {seed} {time.monotonic()}"))
    return answer.status == 200 and int(answer.headers["x-baton-kv-bytes"]) > 0
