"""Many requests in a row and many at once: none hangs, none is lost, nothing stays behind."""

from __future__ import annotations

import random
import time
from concurrent.futures import ThreadPoolExecutor

from tests.system.cases import random_prompt
from tests.system.fleet import Answer, Fleet

NUM_IN_A_ROW = 500
NUM_AT_ONCE = 64
STALL_S = 10.0
"""Far above what an idle or a busy test machine needs for one short request, far below the lease."""


def _ask(fleet: Fleet, number: int) -> tuple[Answer, float]:
    dice = random.Random(number)
    prompt = random_prompt(dice.choice([1, 31, 32, 33, 64, 100, 200]), number)
    started_s = time.monotonic()
    answer = fleet.complete(prompt, max_tokens=4, temperature=0, ignore_eos=True)
    return answer, time.monotonic() - started_s


def _check(answers: list[tuple[Answer, float]]) -> None:
    for answer, _ in answers:
        assert answer.status == 200, answer.body
        assert answer.json["usage"]["completion_tokens"] == 4
        assert answer.headers["x-baton-attempts"] == "1"
    slowest_s = max(took_s for _, took_s in answers)
    assert slowest_s < STALL_S, f"one request took {slowest_s:.1f} s"


def test_hundreds_in_a_row(real_fleet: Fleet) -> None:
    before = real_fleet.workers()["decode-1"]["load"]
    _check([_ask(real_fleet, number) for number in range(NUM_IN_A_ROW)])
    after = real_fleet.workers()["decode-1"]["load"]
    assert after["num_kv_transfers"] - before["num_kv_transfers"] == NUM_IN_A_ROW
    assert after["num_kv_transfer_failures"] == before["num_kv_transfer_failures"]
    real_fleet.wait_until_idle()


def test_sixty_four_at_once(real_fleet: Fleet) -> None:
    with ThreadPoolExecutor(NUM_AT_ONCE) as threads:
        numbers = range(10_000, 10_000 + 2 * NUM_AT_ONCE)
        answers = list(threads.map(lambda number: _ask(real_fleet, number), numbers))
    alone = [_ask(real_fleet, number) for number in list(numbers)[:8]]
    _check(answers)
    for (crowded, _), (single, _) in zip(answers, alone, strict=False):
        assert crowded.json["choices"] == single.json["choices"]
    real_fleet.wait_until_idle()
