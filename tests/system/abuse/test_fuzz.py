"""Ten thousand and more mutated bodies and frames, over every door and to a worker."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import msgspec
import pytest

from baton.contract import codec
from baton.contract.lifecycle import WorkerRole
from baton.contract.messages import (
    AbortLeg,
    AbortRequest,
    Heartbeat,
    KvSource,
    PrefillFinished,
    SequenceDelta,
    StartDecode,
    StartPrefill,
    StepOutputs,
    SubmitRequest,
    WorkerLoad,
)
from baton.contract.sampling import SamplingSpec
from baton.contract.tokens import pack_token_ids
from tests.system.fleet import Fleet, wait_for
from tests.system.wire import FakeCoordinator, Peer, registration_like, submission

NUM_BODIES, NUM_CLIENT_FRAMES, NUM_FLEET_FRAMES, NUM_WORKER_FRAMES = 4000, 2500, 2500, 1500
MAX_GROWTH_BYTES = 64 << 20


# ── ten thousand and more ────────────────────────────────────────────────────────────────────


def _mutated(dice: random.Random, good: list[bytes]) -> bytes:
    frame = bytearray(dice.choice(good))
    for _ in range(dice.randint(0, 5)):
        position = dice.randrange(len(frame) + 1)
        match dice.randrange(4):
            case 0:
                frame[position : position + 1] = bytes([dice.randrange(256)])
            case 1:
                del frame[position : position + dice.randint(1, 12)]
            case 2:
                frame[position:position] = dice.randbytes(dice.randint(1, 12))
            case _:
                frame[position:] = dice.choice(good)[position:]
    return bytes(frame)


def _resident_bytes(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def memory_is_not_eaten(fleet: Fleet) -> Iterator[None]:
    before = {name: _resident_bytes(member.pid) for name, member in fleet.members.items()}
    yield
    for name, member in fleet.members.items():
        growth = _resident_bytes(member.pid) - before[name]
        assert growth < MAX_GROWTH_BYTES, f"{name} grew by {growth >> 20} MiB"


@pytest.mark.usefixtures("memory_is_not_eaten")
def test_four_thousand_fuzzed_bodies(fleet: Fleet) -> None:
    dice = random.Random(20261121)
    chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "tools": [], "n": 1}
    complete = {
        "prompt": [1, 2, 3],
        "max_tokens": 3,
        "temperature": 0.5,
        "stop": ["a"],
        "logprobs": 2,
        "n": 2,
    }
    good = [
        json.dumps(complete).encode(),
        json.dumps({**complete, "stream": True, "seed": 7, "logit_bias": {"5": 1.5}}).encode(),
        json.dumps(chat).encode(),
        json.dumps({**chat, "tools": None, "stream": True, "logprobs": True, "top_logprobs": 2}).encode(),
        json.dumps({"prompt": "hello there", "max_tokens": 2, "response_format": {"type": "text"}}).encode(),
    ]
    statuses: dict[int, int] = {}
    connection = HTTPConnection("127.0.0.1", fleet.http_port, timeout=60)
    try:
        for _ in range(NUM_BODIES):
            path = dice.choice(["/v1/completions", "/v1/chat/completions", "/tokenize"])
            connection.request("POST", path, body=_mutated(dice, good))
            response = connection.getresponse()
            body = response.read()
            statuses[response.status] = statuses.get(response.status, 0) + 1
            if response.status != 200:
                assert json.loads(body)["error"]["message"]
    finally:
        connection.close()
    assert set(statuses) <= {200, 400, 404}, statuses
    assert min(statuses[200], statuses[400]) > NUM_BODIES / 20, statuses


@pytest.mark.usefixtures("memory_is_not_eaten")
def test_thousands_of_fuzzed_client_frames(fleet: Fleet) -> None:
    dice = random.Random(1)
    version = codec.PROTOCOL_VERSION
    good = [
        codec.encode(submission("r", [1, 2, 3], stop=["a", "b"], logprobs=2, seed=4)),
        codec.encode(SubmitRequest(protocol_version=version, request_id="text", prompt="hello", model=None)),
        codec.encode(
            SubmitRequest(protocol_version=version, request_id="chat",
                          messages=[{"role": "user", "content": "x"}], sampling=SamplingSpec(max_tokens=2))
        ),
        codec.encode(AbortRequest(request_id="r")),
    ]  # fmt: skip
    heard = 0
    for _ in range(NUM_CLIENT_FRAMES // 100):
        with Peer(fleet.client_port) as client:
            for number in range(100):
                frames = [_mutated(dice, good) for _ in range(dice.choice([1, 1, 1, 1, 2, 3]))]
                client.send(*frames)
                if number % 20 == 0:
                    heard += len(client.hear_all())
            client.say(submission("last"))
            while client.hear()["request_id"] != "last":
                heard += 1
    assert heard > NUM_CLIENT_FRAMES / 4


@pytest.mark.usefixtures("memory_is_not_eaten")
def test_thousands_of_fuzzed_fleet_frames(fleet: Fleet) -> None:
    """From strangers, and from strangers that have registered."""
    dice = random.Random(2)
    real = fleet.workers()["decode-1"]
    delta = SequenceDelta("h1", [1], "a")
    source = KvSource(lease_s=5.0, num_tokens=3, num_bytes=9, transfer_params={"a": [1]})
    good = [
        codec.encode(Heartbeat(load=WorkerLoad(), num_legs=3)),
        codec.encode(StepOutputs(deltas=[delta, delta], load=WorkerLoad())),
        codec.encode(PrefillFinished(delta=delta, kv_source=source, queue_s=0.0, prefill_s=0.0,
                                     load=WorkerLoad())),
        codec.encode(registration_like(real, worker_id="fuzz", role=WorkerRole.DECODE)),
        codec.encode(registration_like(real, worker_id="fuzz", role=WorkerRole.PREFILL)),
        msgspec.msgpack.encode({"type": "WorkerLeaving", "reason": "fuzz"}),
    ]  # fmt: skip
    for _ in range(NUM_FLEET_FRAMES // 100):
        with Peer(fleet.fleet_port) as stranger:
            for _ in range(100):
                stranger.send(*[_mutated(dice, good) for _ in range(dice.choice([1, 1, 1, 2]))])
            # Something must come back for what it sent: at least one frame was no registration.
            stranger.send(b"")
            stranger.hear()


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_thousands_of_fuzzed_frames_to_a_worker(fleet: Fleet, role: str, tmp_path: Path) -> None:
    """
    1. a worker registers with a coordinator that sends it mutated messages, some of which are valid
    2. everything is aborted: the worker holds nothing, and serves one more leg
    """
    dice = random.Random(3)
    coordinator = FakeCoordinator()
    lonely = Fleet(tmp_path, engine="simulated", fleet_port=coordinator.port)
    try:
        worker = lonely.start_worker(role, "fuzzed", "--num-blocks", "256", "--simulated-step-s", "0.001")
        coordinator.accept()
        prompt, sampling = pack_token_ids(range(40)), SamplingSpec(max_tokens=3, stop=["q"], logprobs=1)
        source = KvSource(lease_s=0.5, num_tokens=40, num_bytes=9, transfer_params={"host": "x", "port": 1})
        prefill = StartPrefill(
            handoff_id="h1", request_id="r", prompt_token_ids=prompt, sampling=sampling, keep_kv=False
        )
        decode = StartDecode(
            handoff_id="h2", request_id="r", prompt_token_ids=prompt, sampling=sampling, kv_source=None
        )
        with_source = msgspec.structs.replace(decode, handoff_id="h3", kv_source=source)
        good = [
            codec.encode(message) for message in (prefill, decode, with_source, AbortLeg(handoff_id="h1"))
        ]
        before_bytes = _resident_bytes(worker.pid)
        for number in range(NUM_WORKER_FRAMES // 2):
            coordinator.send(*[_mutated(dice, good) for _ in range(dice.choice([1, 1, 1, 2]))])
            if number % 100 == 0:
                coordinator.hear()
        last = prefill if role == "prefill" else decode
        coordinator.say(msgspec.structs.replace(last, handoff_id="last"))
        wait_for("the last leg's end", lambda: _is_end_of("last", coordinator.hear()), 30.0)
        load_of_nothing = [0, 0, 256]

        def is_idle() -> bool:
            heard = coordinator.hear()
            return bool(heard["type"] == "Heartbeat" and heard["load"][:3] == load_of_nothing)

        wait_for("a worker that holds nothing", is_idle, 30.0)
        assert worker.is_alive()
        assert _resident_bytes(worker.pid) - before_bytes < MAX_GROWTH_BYTES
    finally:
        coordinator.close()  # it would not tell a leaving worker that it may go
        lonely.stop()


def _is_end_of(handoff_id: str, heard: dict[str, Any]) -> bool:
    if heard["type"] == "PrefillFinished":
        return str(heard["delta"][0]) == handoff_id
    if heard["type"] == "StepOutputs":
        return any(delta[0] == handoff_id and delta[3] is not None for delta in heard["deltas"])
    assert heard.get("handoff_id") != handoff_id, heard
    return False
