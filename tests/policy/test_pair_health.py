"""Fences between two workers, as facts and times."""

from __future__ import annotations

import pytest

from baton.policy.pair_health import FENCE_S, MAX_FAILURES, PairHealth


def failed(health: PairHealth, times: int, now_s: float = 0.0, pair: tuple[int, int] = (1, 2)) -> None:
    for _ in range(times):
        health.failed(*pair, now_s)


def test_three_failures_in_a_row_fence_the_pair_and_nobody_else():
    health = PairHealth()
    failed(health, MAX_FAILURES - 1)
    assert not health.has_bad and health.fenced_with(2, 0.0) == frozenset()
    failed(health, 1)
    assert health.has_bad
    assert health.fenced_with(2, 0.0) == {1}
    assert health.fenced_with(3, 0.0) == frozenset()


def test_a_success_between_them_starts_the_count_over():
    health = PairHealth()
    for _ in range(4):
        failed(health, MAX_FAILURES - 1)
        health.succeeded(1, 2)
    assert not health.has_bad and list(health) == []


@pytest.mark.parametrize("is_well", [True, False])
def test_after_a_while_one_request_is_tried(is_well):
    """
    1. the fence ends: the pair may be chosen
    2. it is: until its trial has an outcome, or another fence's time has gone by, nobody else is sent there
    3. the outcome opens the pair, or closes it again at the first failure
    """
    health = PairHealth()
    failed(health, MAX_FAILURES)
    assert health.fenced_with(2, FENCE_S - 0.1) == {1}
    assert health.fenced_with(2, FENCE_S) == frozenset()
    health.chosen(1, 2, FENCE_S)
    assert health.fenced_with(2, FENCE_S + 1) == {1}
    if is_well:
        health.succeeded(1, 2)
        assert not health.has_bad
    else:
        health.failed(1, 2, FENCE_S + 5)
    assert health.fenced_with(2, 2 * FENCE_S + 4) == (frozenset() if is_well else {1})
    assert health.fenced_with(2, 2 * FENCE_S + 5) == frozenset()


def test_choosing_a_pair_that_works_means_nothing():
    health = PairHealth()
    failed(health, 1)
    health.chosen(1, 2, 0.0)
    assert health.fenced_with(2, 0.0) == frozenset()


@pytest.mark.parametrize("slot", [1, 2])
def test_another_process_on_either_side_is_another_pair(slot):
    health = PairHealth()
    failed(health, MAX_FAILURES)
    failed(health, 1, pair=(5, 6))
    health.left(slot)
    assert not health.has_bad and [(pair.prefill, pair.decode) for pair in health] == [(5, 6)]
    failed(health, 1)
    assert not health.has_bad
