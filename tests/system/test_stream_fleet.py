"""A fleet whose prefill worker writes KV while it computes: the same answers, nothing left behind."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.system.cases import BLOCK, random_prompt
from tests.system.fleet import Fleet
from tests.system.test_lease import ask, greedy_alone

STREAM = ("--transfer", "stream")

Start = Any


@pytest.fixture
def fleet(start_real_fleet: Start) -> Fleet:
    streaming: Fleet = start_real_fleet(prefill=STREAM, decode=STREAM)
    return streaming


def received_bytes(fleet: Fleet) -> int:
    count: int = fleet.workers()["decode-1"]["load"]["num_kv_bytes_received"]
    return count


@pytest.mark.parametrize("num_tokens", [3, 5 * BLOCK, 1100])
def test_streamed_answers_equal_local_ones(fleet: Fleet, num_tokens: int) -> None:
    prompt = random_prompt(num_tokens, "stream")
    expected = greedy_alone(fleet, prompt)
    before = received_bytes(fleet)
    answer = ask(fleet, prompt)
    assert answer.status == 200, answer.json
    assert answer.json["choices"][0]["token_ids"] == expected
    fleet.wait_until_idle()
    assert received_bytes(fleet) > before


def test_many_at_once(fleet: Fleet) -> None:
    prompts = [random_prompt(300 + 200 * number, f"stream {number}") for number in range(5)]
    expected = [greedy_alone(fleet, prompt) for prompt in prompts]
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(lambda prompt: ask(fleet, prompt), prompts))
    assert [answer.json["choices"][0]["token_ids"] for answer in answers] == expected
    fleet.wait_until_idle()


def test_clients_that_leave_at_any_time_leave_nothing_behind(fleet: Fleet) -> None:
    for number in range(12):
        stream = fleet.stream(
            "/v1/completions",
            {"prompt": random_prompt(1200, f"leave {number}"), "max_tokens": 50, "ignore_eos": True},
        )
        time.sleep(0.04 * number)  # in the queue, in prefill, while KV moves, while it is decoded
        stream.close()
    fleet.wait_until_idle(20.0)
    prompt = random_prompt(400, "after")
    assert ask(fleet, prompt).json["choices"][0]["token_ids"] == greedy_alone(fleet, prompt)
    fleet.wait_until_idle()
