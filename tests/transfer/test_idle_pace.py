"""An engine that waits in vain steps more slowly; one with work never rests; what comes ends a rest."""

from __future__ import annotations

import pytest

from baton.transfer.idle_pace import LOOK_S, NUM_FAST_STEPS, SLOW_STEP_S, IdlePace, rest_until


def test_the_first_steps_of_a_wait_come_at_full_pace():
    pace = IdlePace()
    assert [pace.sleep_s(has_work=False) for _ in range(NUM_FAST_STEPS)] == [0.0] * NUM_FAST_STEPS
    assert pace.sleep_s(has_work=False) == SLOW_STEP_S


def test_work_starts_the_count_again():
    pace = IdlePace()
    for _ in range(NUM_FAST_STEPS + 5):
        pace.sleep_s(has_work=False)
    assert pace.sleep_s(has_work=True) == 0.0
    assert pace.sleep_s(has_work=False) == 0.0


def test_what_comes_ends_a_rest():
    slept_s: list[float] = []
    looks = iter([False, False, True])
    rest_until(lambda: next(looks), SLOW_STEP_S, slept_s.append)
    assert sum(slept_s) == pytest.approx(2 * LOOK_S)


def test_a_rest_in_which_nothing_comes_has_its_whole_length():
    for rest_s in (SLOW_STEP_S, 0.3 * LOOK_S, 2.7 * LOOK_S):
        slept_s: list[float] = []
        rest_until(lambda: False, rest_s, slept_s.append)
        assert sum(slept_s) == pytest.approx(rest_s)
        assert max(slept_s) <= 1.5 * LOOK_S
