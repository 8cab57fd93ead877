"""Real engines: one of two decode workers is killed in the middle of answers; they are a quiet run's."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tests.system.cases import random_prompt
from tests.system.fleet import Fleet, wait_for

NUM_TOKENS = 300


def body(number: int) -> dict[str, Any]:
    wanted: dict[str, Any] = {
        "prompt": random_prompt(70, f"resume {number}"), "max_tokens": NUM_TOKENS, "temperature": 0,
        "ignore_eos": True, "return_token_ids": True,
    }  # fmt: skip
    if number == 1:
        wanted |= {"logprobs": 1, "max_tokens": NUM_TOKENS // 2}
    return wanted


def read(fleet: Fleet, wanted: dict[str, Any]) -> tuple[str, list[int], list[str], int]:
    """(text, token ids, tokens as logprobs name them, times resumed)"""
    stream = fleet.stream("/v1/completions", wanted | {"stream_options": {"include_usage": True}})
    try:
        *events, last = stream
        assert stream.is_done, last
    finally:
        stream.close()
    choices = [choice for event in events for choice in event["choices"]]
    named = [name for choice in choices if choice["logprobs"] for name in choice["logprobs"]["tokens"]]
    token_ids = [token for choice in choices for token in choice["token_ids"]]
    return "".join(choice["text"] for choice in choices), token_ids, named, last["baton"]["resumes"]


def busy_decode_workers(fleet: Fleet) -> list[str]:
    workers = fleet.workers().items()
    return [name for name, w in workers if w["load"]["num_running"] and w["role"] == "decode"]


def test_pain_19_streams_of_a_killed_decode_worker_go_on_with_the_same_text(start_real_fleet: Any) -> None:
    """
    1. answers to three prompts, nobody disturbs them
    2. the same again; one decode worker is killed when it is at work
    3. text, token ids and the names in logprobs are those of the first time, and some were resumed
    """
    fleet: Fleet = start_real_fleet(
        coordinator=("--prefill-policy", "random"), roles=("prefill", "decode", "decode")
    )
    fleet.wait_until_idle(40.0)
    bodies = [body(number) for number in range(3)]
    with ThreadPoolExecutor(len(bodies)) as threads:
        expected = list(threads.map(lambda wanted: read(fleet, wanted), bodies))
        assert [num_resumes for *_, num_resumes in expected] == [0] * 3
        assert fleet.snapshot()["bad_pairs"] == []  # no hand-off was held to have failed
        running = [threads.submit(read, fleet, wanted) for wanted in bodies]

        fleet.kill(wait_for("work", lambda: busy_decode_workers(fleet), 100.0)[0])
        found = [future.result() for future in running]
    assert [answer[:3] for answer in found] == [answer[:3] for answer in expected]
    assert sum(num_resumes for *_, num_resumes in found) >= 1
    fleet.wait_until_idle(40.0)
