"""The polling thread, on an agent made by hand: it polls while asked to, and loses no notice."""

from __future__ import annotations

import threading

import pytest

from baton.transfer.nixl_progress import TransferProgress


class Agent:
    """Hands out one notice per poll, until `limit`."""

    def __init__(self, limit: int = 0) -> None:
        self._limit = limit
        self.num_polls = 0
        self.polled = threading.Event()

    def get_new_notifs(self) -> dict[str, list[bytes]]:
        self.num_polls += 1
        self.polled.set()
        return {"peer": [b"%d" % self.num_polls]} if self.num_polls <= self._limit else {}


@pytest.fixture
def agent() -> Agent:
    return Agent(limit=5)


def test_what_the_thread_found_reaches_the_engine_once_and_in_order(agent):
    progress = TransferProgress(agent)
    progress.set_in_flight(True)
    found: list[bytes] = []
    while len(found) < 5:
        assert agent.polled.wait(5)
        found += agent.get_new_notifs().get("peer", [])
    progress.stop()
    assert found == [b"1", b"2", b"3", b"4", b"5"]
    assert agent.get_new_notifs() == {}


def test_it_rests_while_nothing_is_in_flight(agent):
    progress = TransferProgress(agent)
    assert not agent.polled.wait(0.05)
    progress.set_in_flight(True)
    assert agent.polled.wait(5)
    progress.set_in_flight(False)
    progress.stop()


def test_stop_ends_a_thread_that_never_worked(agent):
    progress = TransferProgress(agent)
    progress.stop()
    progress.stop()
    assert not any(thread.name == "kv-transfer-progress" for thread in threading.enumerate())
