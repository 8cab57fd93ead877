"""users' pain 11: workers that cannot hand KV to each other; the client hears at once which field."""

from __future__ import annotations

import time
from typing import Any

import msgspec

from baton.contract.lifecycle import WorkerRole
from baton.launch import processes
from tests.system.fleet import Fleet, wait_for
from tests.system.wire import Peer, registration_like

DIFFERENCES: dict[str, Any] = {
    "protocol_version": 99, "model": "other", "engine": "simulated 2", "transfer": "nixl 9",
    "dtype": "bfloat16", "block_size_tokens": 64, "cache_dtype": "fp8", "attention_backend": "FLASHINFER",
    "weights": "ffff", "pipeline_parallel_size": 2,
}  # fmt: skip


def test_each_difference_is_a_sentence_for_worker_and_client(tmp_path: Any) -> None:
    """
    1. one prefill worker is up; decode workers that differ from it in one field each are refused by name
    2. after each of them a request hears 503 within a second: the field, and both values
    3. a real process with another block size exits with 1 and says why; one that fits is served by
    """
    fleet = Fleet(tmp_path, engine="simulated")
    fleet.start_coordinator()
    fleet.start_worker("prefill", "prefill-1")
    try:
        wait_for("the coordinator", lambda: " coordinator ready " in fleet.log("coordinator"), 60.0)
        wait_for("the worker", fleet.workers, 60.0)
        (worker,) = fleet.workers().values()
        for field, value in DIFFERENCES.items():
            stranger = registration_like(worker, worker_id=f"decode-{field}", role=WorkerRole.DECODE)
            here = getattr(stranger, field, None) or getattr(stranger.layout, field, None)
            if hasattr(stranger, field):
                stranger = msgspec.structs.replace(stranger, **{field: value})
            else:
                layout = msgspec.structs.replace(stranger.layout, **{field: value})
                stranger = msgspec.structs.replace(stranger, layout=layout)
            with Peer(fleet.fleet_port) as peer:
                peer.say(stranger)
                assert peer.hear()["type"] == "WorkerRefused"
            asked_s = time.monotonic()
            answer = fleet.complete([1, 2, 3], max_tokens=4)
            assert time.monotonic() - asked_s < 1.0
            assert (answer.status, answer.error["code"]) == (503, "no_workers")
            message = answer.error["message"]
            for part in (f"decode-{field}", field.partition("_version")[0], str(value), str(here)):
                assert part in message, message
        misfit = fleet.start_worker("decode", "misfit", "--block-size-tokens", "64")
        assert processes.wait_for_exit([misfit], 20.0)
        assert misfit.exit_status() == 1
        assert "block_size_tokens is 64, this fleet has 32" in misfit.log_text()
        fleet.ended.append(fleet.members.pop("misfit"))
        assert "misfit cannot join: block_size_tokens is 64" in fleet.ask("GET", "/ready").error["message"]
        fleet.start_worker("decode", "decode-1")
        fleet.wait_until_ready()
        assert fleet.complete([1, 2, 3], max_tokens=4).status == 200
    finally:
        fleet.stop()
