"""An engine that waits in vain steps more slowly; one with work never rests."""

from __future__ import annotations

from baton.transfer.idle_pace import NUM_FAST_STEPS, SLOW_STEP_S, IdlePace


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
