"""KV that is read too late is another prompt's. Whatever stands still for how long: the right answer or a
typed error, never other text.

Where KV is streamed nobody reads it (tests/engine/test_vllm_stream.py has who registers late).

The prefill worker's cache is small and is written over as soon as the leases have ended, so a late read
would get wrong KV for certain; that the same fleet notices nothing of it otherwise is what
test_differential.py shows.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from tests.system.cases import BLOCK, random_prompt
from tests.system.fleet import Answer, Fleet, elapsed, wait_for

LEASE_S = 4
"""Two seconds more than the reader's margin."""

NUM_PROMPTS = 4
NUM_BLOCKS_PER_PROMPT = 6
NUM_OUTPUT = 10

COORDINATOR = ("--heartbeat-timeout-s", "60", "--handoff-timeout-s", "50")
PREFILL = (
    "--transfer",
    "pull",
    "--kv-lease-s",
    str(LEASE_S),
    "--kv-cache-gib",
    "0.0085",
)  # 69 blocks of 128 KiB

Start = Any


def greedy_alone(fleet: Fleet, prompt: list[int]) -> list[int]:
    """Token by token from the prefill worker: an answer of one token needs no transfer."""
    token_ids: list[int] = []
    for _ in range(NUM_OUTPUT):
        answer = fleet.complete(
            prompt + token_ids, max_tokens=1, temperature=0, ignore_eos=True, return_token_ids=True
        )
        token_ids += answer.json["choices"][0]["token_ids"]
    return token_ids


def ask(fleet: Fleet, prompt: list[int]) -> Answer:
    return fleet.complete(
        prompt, max_tokens=NUM_OUTPUT, temperature=0, ignore_eos=True, return_token_ids=True
    )


def overwrite_cache(fleet: Fleet, seed: object) -> None:
    """Fill every block of the prefill worker with other prompts, none of which is held."""
    for number in range(10):
        prompt = random_prompt(8 * BLOCK, f"overwrite {seed} {number}")
        assert fleet.complete(prompt, max_tokens=1).status == 200


def keep_busy(fleet: Fleet, asked: list[Future[Answer]]) -> None:
    """A prefill engine drives transfers while it steps. An idle one would let a late read starve, which
    is no protection: it is never idle when it matters."""
    number = 0
    while not all(future.done() for future in asked):
        number += 1
        overwrite_cache(fleet, f"busy {number}")


def all_free(fleet: Fleet, name: str) -> bool:
    worker = fleet.workers()[name]
    return bool(worker["load"]["num_free_blocks"] == worker["capacity"]["num_blocks"])


def prompts_of(episode: str) -> list[list[int]]:
    num_tokens = NUM_BLOCKS_PER_PROMPT * BLOCK + 5
    return [random_prompt(num_tokens, f"{episode} {number}") for number in range(NUM_PROMPTS)]


def stand_still(fleet: Fleet, name: str, episode: str) -> list[tuple[list[int], Answer]]:
    """Hand-offs whose `name` stands still from before the prefill's end until the leases are over and
    the blocks are written over. With the right tokens of each."""
    prompts = prompts_of(episode)
    right = [greedy_alone(fleet, prompt) for prompt in prompts]
    overwrite_cache(fleet, f"before {episode}")
    fleet.wait_until_idle()
    with ThreadPoolExecutor(NUM_PROMPTS) as threads:
        fleet.pause(name)
        try:
            asked: list[Future[Answer]] = [threads.submit(ask, fleet, prompt) for prompt in prompts]
            wait_for("held KV", lambda: not all_free(fleet, "prefill-1"), 20.0)
            wait_for("the prompts computed", lambda: _num_queued_tokens(fleet) == 0, 20.0)
            wait_for("the end of the leases", lambda: all_free(fleet, "prefill-1"), 4.0 * LEASE_S)
            overwrite_cache(fleet, f"after {episode}")
        finally:
            fleet.resume(name)
        keep_busy(fleet, asked)
        return list(zip(right, (future.result() for future in asked), strict=True))


def _num_queued_tokens(fleet: Fleet) -> int:
    return int(fleet.workers()["prefill-1"]["num_queued_tokens"])


def check_aftermath(fleet: Fleet, episode: str, answered: list[tuple[list[int], Answer]]) -> None:
    """Asked again, the same prompts give the same tokens: no wrong KV stayed in a prefix cache."""
    for prompt, (right, _) in zip(prompts_of(episode), answered, strict=True):
        again = ask(fleet, prompt)
        assert again.status == 200, again.body
        assert again.json["choices"][0]["token_ids"] == right
    fleet.wait_until_idle(4.0 * LEASE_S)


def test_a_decode_worker_that_stood_still_recomputes(start_real_fleet: Start) -> None:
    fleet = start_real_fleet(coordinator=COORDINATOR, prefill=PREFILL)
    failures_before = fleet.workers()["decode-1"]["load"]["num_kv_transfer_failures"]
    answered = stand_still(fleet, "decode-1", "recompute")
    for right, answer in answered:
        assert answer.status == 200, answer.body
        assert answer.json["choices"][0]["token_ids"] == right
    check_aftermath(fleet, "recompute", answered)
    after = fleet.workers()["decode-1"]["load"]
    assert after["num_kv_transfer_failures"] >= failures_before


def test_a_coordinator_that_stood_still_hands_no_ended_lease_on(start_real_fleet: Start) -> None:
    """
    1. prompts are being computed; the coordinator stands still until their leases have ended
    2. it finds the news of their end in its queue: whoever asked gets the right tokens all the same
    """
    fleet = start_real_fleet(coordinator=COORDINATOR, prefill=PREFILL)
    prompts = prompts_of("coordinator")
    right = [greedy_alone(fleet, prompt) for prompt in prompts]
    overwrite_cache(fleet, "coordinator")
    fleet.wait_until_idle()
    with ThreadPoolExecutor(NUM_PROMPTS) as threads:
        asked = [threads.submit(ask, fleet, prompt) for prompt in prompts]
        wait_for("prompts being computed", lambda: fleet.snapshot()["num_requests"], 20.0)
        fleet.pause("coordinator")
        try:
            log = fleet.members["prefill-1"]
            wait_for("the prompts computed", lambda: "kv_bytes=" in log.log_text(), 20.0)
            wait_for("a time longer than the lease", elapsed(LEASE_S + 1.0), LEASE_S + 5.0)
        finally:
            fleet.resume("coordinator")
        keep_busy(fleet, asked)
        answers = [future.result() for future in asked]
    for tokens, answer in zip(right, answers, strict=True):
        assert answer.status == 200, answer.body
        assert answer.json["choices"][0]["token_ids"] == tokens
    fleet.wait_until_idle(4.0 * LEASE_S)


def test_a_decode_worker_that_stood_still_fails_if_it_must_not_recompute(start_real_fleet: Start) -> None:
    fleet = start_real_fleet(
        coordinator=(*COORDINATOR, "--transfer-failure-policy", "fail"),
        prefill=PREFILL,
        decode=("--kv-load-failure-policy", "fail"),
    )
    answered = stand_still(fleet, "decode-1", "fail")
    for _, answer in answered:
        assert answer.status == 502, answer.body
        assert answer.error["code"] in ("kv_transfer_failed", "worker_lost")
    check_aftermath(fleet, "fail", answered)
