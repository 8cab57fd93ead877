"""A fleet that bad input is sent to, and what must be true after each piece of it.

The workers are simulated, so that ten thousand broken frames and bodies cost seconds.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.fleet import Fleet, wait_for

MAX_MODEL_LEN = 2048
HEARTBEAT_TIMEOUT_S = 3.0

GREEDY = {"max_tokens": 12, "temperature": 0}


@pytest.fixture(scope="module")
def fleet(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    fleet = Fleet(tmp_path_factory.mktemp("abused"), engine="simulated", model=model)
    # Strangers that register are workers here, although they would never pass the test of joining.
    fleet.start_coordinator("--heartbeat-timeout-s", str(HEARTBEAT_TIMEOUT_S), "--no-join-test")
    worker = ("--max-model-len", str(MAX_MODEL_LEN), "--num-blocks", "512", "--simulated-step-s", "0.001")
    fleet.start_worker("prefill", "prefill-1", *worker)
    fleet.start_worker("decode", "decode-1", *worker)
    try:
        fleet.wait_until_ready()
        yield fleet
    finally:
        fleet.stop()


@pytest.fixture(autouse=True)
def nothing_is_held_and_the_fleet_serves(fleet: Fleet) -> Iterator[None]:
    """After each test: the same answer as before it, the same workers, and no trace of what was done."""
    before = fleet.complete([5, 6, 7], **GREEDY)
    assert before.status == 200, before.body
    boot_ids = {name: worker["boot_id"] for name, worker in fleet.workers().items()}
    yield
    wait_for(
        "the workers of before, and only they",
        lambda: {name: worker["boot_id"] for name, worker in fleet.workers().items()} == boot_ids,
        timeout_s=4 * HEARTBEAT_TIMEOUT_S,
    )
    fleet.wait_until_idle(20.0)
    after = fleet.complete([5, 6, 7], **GREEDY)
    assert after.status == 200, after.body
    assert after.json["choices"] == before.json["choices"]
