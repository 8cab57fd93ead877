"""A fleet whose prefill worker writes KV while it computes, short of memory on both sides: the same answers,
nobody waits for a lease, nothing is left behind."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.system.cases import BLOCK, random_prompt
from tests.system.fleet import Fleet
from tests.system.test_lease import ask, greedy_alone

DECODE = ("--transfer", "stream", "--max-model-len", "704", "--kv-cache-gib", "0.00294")
"""24 blocks of 128 KiB, one of which vLLM keeps."""
PREFILL = (*DECODE, "--max-num-batched-tokens", "128")

NUM_PROMPTS = 64

Start = Any


@pytest.fixture
def fleet(start_real_fleet: Start) -> Fleet:
    streaming: Fleet = start_real_fleet(
        prefill=PREFILL, decode=DECODE, coordinator=("--queue-timeout-s", "300", "--handoff-timeout-s", "120")
    )
    return streaming


def received_bytes(fleet: Fleet) -> int:
    count: int = fleet.workers()["decode-1"]["load"]["num_kv_bytes_received"]
    return count


@pytest.mark.parametrize("num_tokens", [3, 5 * BLOCK, 600])
def test_streamed_answers_equal_local_ones(fleet: Fleet, num_tokens: int) -> None:
    prompt = random_prompt(num_tokens, "stream")
    expected = greedy_alone(fleet, prompt)
    before = received_bytes(fleet)
    answer = ask(fleet, prompt)
    assert answer.status == 200, answer.json
    assert answer.json["choices"][0]["token_ids"] == expected
    assert answer.headers["x-baton-transfer"] == "stream"
    fleet.wait_until_idle()
    assert received_bytes(fleet) > before


def test_many_at_once(fleet: Fleet) -> None:
    prompts = [random_prompt(200 + 100 * number, f"stream {number}") for number in range(5)]
    expected = [greedy_alone(fleet, prompt) for prompt in prompts]
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(lambda prompt: ask(fleet, prompt), prompts))
    assert [answer.json["choices"][0]["token_ids"] for answer in answers] == expected
    fleet.wait_until_idle()


def test_clients_that_leave_at_any_time_leave_nothing_behind(fleet: Fleet) -> None:
    for number in range(12):
        stream = fleet.stream(
            "/v1/completions",
            {"prompt": random_prompt(620, f"leave {number}"), "max_tokens": 50, "ignore_eos": True},
        )
        time.sleep(0.04 * number)  # in the queue, in prefill, while KV moves, while it is decoded
        stream.close()
    fleet.wait_until_idle(20.0)
    prompt = random_prompt(400, "after")
    assert ask(fleet, prompt).json["choices"][0]["token_ids"] == greedy_alone(fleet, prompt)
    fleet.wait_until_idle()


def num_streams_failed(fleet: Fleet) -> int:
    """By a lease's end or anything else: both sides say it."""
    logs = fleet.log("prefill-1") + fleet.log("decode-1")
    return logs.count("kv stream ended") + logs.count("kv stream given up")


def test_a_crowd_of_long_prompts_before_tiny_pools(fleet: Fleet) -> None:
    """
    1. either worker holds one long prompt at a time, or many short ones; the prefill worker takes those
       first, the decode worker promises blocks in the order in which they came: long ones first
    2. every prompt is answered, in one attempt, with its own text
    3. no worker gave anything up or waited for a lease to end
    """
    lengths = [600] * 4 + [60] * 12
    prompts = [random_prompt(lengths[number % 16], f"crowd {number}") for number in range(NUM_PROMPTS)]
    expected = {number: greedy_alone(fleet, prompts[number]) for number in (0, 5, 19, 31)}
    num_failed_before = num_streams_failed(fleet)
    with ThreadPoolExecutor(NUM_PROMPTS) as pool:
        answers = list(pool.map(lambda prompt: ask(fleet, prompt), prompts))
    assert {answer.status for answer in answers} <= {200, 429}
    answered = [answer for answer in answers if answer.status == 200]
    assert len(answered) > NUM_PROMPTS // 2
    assert {answer.headers["x-baton-attempts"] for answer in answered} == {"1"}
    for number, tokens in expected.items():
        if answers[number].status == 200:
            assert answers[number].json["choices"][0]["token_ids"] == tokens
    fleet.wait_until_idle()
    assert num_streams_failed(fleet) == num_failed_before
