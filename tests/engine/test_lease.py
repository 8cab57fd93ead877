"""When held KV may be read."""

from __future__ import annotations

import pytest

from baton.transfer.lease import ReadWindow, num_tokens_to_pull, time_left_s


def window() -> ReadWindow:
    return ReadWindow.opened(now_s=100.0, lease_s=30.0, margin_s=2.0, pull_timeout_s=10.0)


@pytest.mark.parametrize(
    ("now_s", "may_start"),
    [(100.0, True), (127.9, True), (128.0, False), (131.0, False)],  # 100 + 30 - 2 = 128
    ids=["fresh", "just-before-the-margin", "at-the-margin", "after-the-lease"],
)
def test_a_read_may_start_until_the_margin(now_s: float, may_start: bool) -> None:
    assert window().may_start(now_s) is may_start


def test_a_read_that_ends_inside_the_margin_is_not_trusted() -> None:
    assert window().is_trusted(ended_s=127.9)
    assert not window().is_trusted(ended_s=128.0)
    assert not window().is_trusted(ended_s=129.5)  # before the lease's end, yet too late to be sure


def test_a_read_is_given_up_after_its_timeout_or_at_the_margin() -> None:
    assert window().deadline_s(started_s=101.0) == 111.0  # 101 + 10
    assert window().deadline_s(started_s=125.0) == 128.0  # the margin comes first


def test_a_lease_shorter_than_the_margin_never_opens() -> None:
    short = ReadWindow.opened(now_s=100.0, lease_s=1.5, margin_s=2.0, pull_timeout_s=10.0)
    assert not short.may_start(100.0)


def test_time_left_is_never_negative() -> None:
    assert time_left_s(lease_end_s=130.0, now_s=101.5) == 28.5
    assert time_left_s(lease_end_s=130.0, now_s=131.0) == 0.0


@pytest.mark.parametrize(
    ("num_held", "num_wanted", "num_cached", "expected"),
    [
        (64, 65, 0, 64),  # the prefill worker's token is appended: its KV exists nowhere
        (64, 64, 0, 64),  # the decode worker samples the first token
        (64, 65, 32, 32),
        (64, 65, 64, 0),  # all in the reader's own cache
        (40, 41, 32, 8),
        (40, 20, 0, 20),
        (32, 129, 96, 0),
    ],
)
def test_only_held_tokens_are_claimed(num_held: int, num_wanted: int, num_cached: int, expected: int) -> None:
    assert num_tokens_to_pull(num_held=num_held, num_wanted=num_wanted, num_cached=num_cached) == expected
