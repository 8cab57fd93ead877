"""Bad input over every door of running processes: a clear error each, nothing held, still serving.

The workers are simulated, so that ten thousand broken frames and bodies cost seconds.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import random
import re
import socket
import time
from collections.abc import Callable, Iterator
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
    LegFailed,
    PrefillFinished,
    RegisterAgain,
    SequenceDelta,
    StartDecode,
    StartPrefill,
    StepOutputs,
    SubmitRequest,
    WorkerLoad,
)
from baton.contract.sampling import SamplingSpec, StructuredOutput
from baton.contract.tokens import pack_token_ids
from tests.system.fleet import Fleet, wait_for
from tests.system.wire import FakeCoordinator, Peer, registration_like, submission

MAX_MODEL_LEN = 2048
HEARTBEAT_TIMEOUT_S = 3.0

NUM_BODIES, NUM_CLIENT_FRAMES, NUM_FLEET_FRAMES, NUM_WORKER_FRAMES = 4000, 2500, 2500, 1500
MAX_GROWTH_BYTES = 64 << 20

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


# ── HTTP ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("body", "status", "code", "words"),
    [
        pytest.param(b'{"prompt": ', 400, "invalid_request", ["not JSON"], id="broken JSON"),
        pytest.param(b"", 400, "invalid_request", ["empty"], id="no body"),
        pytest.param(b'{"prompt": "\xff\xfe"}', 400, "invalid_request", ["UTF-8"], id="invalid UTF-8"),
        pytest.param(
            b'{"prompt": [1], "prompt_embeds": ' + b"[" * 200_000, 400, "invalid_request", ["nested"],
            id="deep nesting",
        ),
        pytest.param({"prompt": {"a": 1}}, 400, "invalid_request", ["prompt"], id="prompt of a wrong type"),
        pytest.param(
            {"prompt": "a", "max_tokens": "x"}, 400, "invalid_request", ["max_tokens"],
            id="max_tokens as text",
        ),
        pytest.param(
            {"prompt": "a", "max_tokens": 0}, 400, "invalid_request", ["max_tokens", "0"], id="max_tokens 0"
        ),
        pytest.param(
            {"prompt": [1, 2], "max_tokens": 10**9}, 400, "context_length_exceeded",
            ["2 tokens", "1000000000", "2048"], id="max_tokens huge",
        ),
        pytest.param(
            {"prompt": [1, 2], "max_tokens": 10**400}, 400, "context_length_exceeded", ["2048"],
            id="max_tokens beyond 64 bits",
        ),
        pytest.param(
            {"prompt": [1] * 2500}, 400, "context_length_exceeded", ["2500", "2048"], id="prompt too long"
        ),
        pytest.param(
            {"prompt": "word " * 30_000}, 400, "context_length_exceeded", ["2048"], id="text too long"
        ),
        pytest.param({"prompt": "a", "model": "gpt"}, 404, "model_not_found", ["gpt"], id="unknown model"),
        pytest.param(
            {"prompt": "a", "stop": [str(i) for i in range(17)]}, 400, "invalid_request", ["17", "16"],
            id="too many stops",
        ),
        pytest.param({"prompt": [2**31]}, 400, "invalid_request", [str(2**31)], id="unknown token id"),
        pytest.param({"prompt": "a", "n": 10**6}, 400, "invalid_request", ["1000000"], id="n of a million"),
        pytest.param(
            {"prompt": "a", "temperature": "NaN"}, 400, "invalid_request", ["temperature"], id="NaN as text"
        ),
    ],
)  # fmt: skip
def test_a_bad_body_is_refused_before_anything_is_computed(
    fleet: Fleet, body: Any, status: int, code: str, words: list[str]
) -> None:
    num_done = fleet.workers()["prefill-1"]["load"]["num_prefill_tokens_done"]
    answer = fleet.ask("POST", "/v1/completions", body)
    assert (answer.status, answer.error["code"]) == (status, code), answer.body
    assert all(word in answer.error["message"] for word in words), answer.error["message"]
    assert fleet.workers()["prefill-1"]["load"]["num_prefill_tokens_done"] == num_done


def test_ten_megabytes_are_read_and_refused_with_numbers(fleet: Fleet) -> None:
    answer = fleet.complete("x" * (10 << 20))
    assert (answer.status, answer.error["code"]) == (400, "context_length_exceeded")
    assert "10485760" in answer.error["message"]
    answer = fleet.complete([7] * 3_000_000)
    assert (answer.status, answer.error["code"]) == (400, "context_length_exceeded")
    assert "3000000" in answer.error["message"]


def test_more_than_a_body_may_have_is_refused_while_it_is_sent(fleet: Fleet) -> None:
    with socket.create_connection(("127.0.0.1", fleet.http_port), timeout=20) as client:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 999999999\r\n\r\n")
        assert client.recv(65536).startswith(b"HTTP/1.1 413 ")


REQUEST = json.dumps({"prompt": [9, 9], "max_tokens": 8, "stream": True}).encode()
HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(REQUEST)


@pytest.mark.parametrize("num_sent", [10, len(HEAD), len(HEAD) + 5], ids=["head", "no body", "half a body"])
def test_a_socket_half_closed_inside_a_request_hears_400(fleet: Fleet, num_sent: int) -> None:
    with socket.create_connection(("127.0.0.1", fleet.http_port), timeout=20) as client:
        client.sendall((HEAD + REQUEST)[:num_sent])
        client.shutdown(socket.SHUT_WR)
        assert client.recv(65536).startswith(b"HTTP/1.1 400 ")


def test_a_socket_half_closed_behind_a_request_holds_nothing(fleet: Fleet) -> None:
    """It may be answered or taken for a client that left; the fixture checks that nothing stays."""
    with socket.create_connection(("127.0.0.1", fleet.http_port), timeout=20) as client:
        client.sendall(HEAD + REQUEST)
        client.shutdown(socket.SHUT_WR)
        received = b""
        while data := client.recv(65536):
            received += data
    assert received == b"" or received.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


def test_a_hundred_slow_clients_delay_nobody_and_are_ended(fleet: Fleet) -> None:
    """
    1. a hundred connections send a header byte by byte: meanwhile others are served at once
    2. each hears 408, or is closed, when the time for a head is over
    """
    slow = [socket.create_connection(("127.0.0.1", fleet.http_port), timeout=30) for _ in range(100)]
    try:
        deadline_s = time.monotonic() + 40.0
        ended: set[int] = set()
        while len(ended) < len(slow):
            assert time.monotonic() < deadline_s, f"{len(slow) - len(ended)} slow clients still connected"
            for number, client in enumerate(slow):
                if number not in ended and _trickle(client, b"POST /v1/completions HTTP/1.1\r\nx-slow: "):
                    ended.add(number)
            started_s = time.monotonic()
            assert fleet.complete([1, 2], **GREEDY).status == 200
            assert time.monotonic() - started_s < 5.0
    finally:
        for client in slow:
            client.close()


def _trickle(client: socket.socket, head: bytes) -> bool:
    """Send the next byte; whether the server has ended the connection."""
    sent = _sent.setdefault(client, 0)
    try:
        client.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            data = client.recv(4096)
            assert not data or data.startswith(b"HTTP/1.1 408 ")
            return True
        client.send(head[sent : sent + 1] or b"a")
    except ConnectionError:
        return True
    _sent[client] += 1
    return False


_sent: dict[socket.socket, int] = {}


# ── the ZeroMQ door ──────────────────────────────────────────────────────────────────────────


class _Pickled:
    """Writes a file when it is unpickled: the proof that nobody did."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, ...]]:
        return os.mkdir, (str(self.path),)


def _refusal(client: Peer) -> tuple[str, str]:
    heard = client.hear()
    assert heard["type"] == "RequestRefused", heard
    return heard["error"]["code"], heard["error"]["message"]


def test_frames_that_are_no_messages_are_refused(fleet: Fleet, tmp_path: Path) -> None:
    good = codec.encode(submission())
    with Peer(fleet.client_port) as client:
        for frames in (
            (good, good),
            (good, b""),
            (b"",),
            (pickle.dumps(_Pickled(tmp_path / "unpickled")),),
            (msgspec.msgpack.encode({"type": "Explode"}),),
            (msgspec.msgpack.encode({"type": "RequestFinished", "request_id": "r"}),),
            (codec.encode(AbortLeg(handoff_id="h")),),
            (b"\xdf\xff\xff\xff\xff",),
            (b"\x91" * 100_000,),
            (good[:-3],),
            (os.urandom(1000),),
        ):
            client.send(*frames)
            assert _refusal(client)[0] == "protocol_mismatch"
    assert not (tmp_path / "unpickled").exists()


def test_a_frame_over_the_limit_ends_its_own_connection_only(fleet: Fleet) -> None:
    with Peer(fleet.client_port) as huge, Peer(fleet.client_port) as other:
        huge.send(b"\x00" * (codec.MAX_MESSAGE_BYTES + 1))
        other.say(submission())
        assert other.hear()["type"] == "RequestDelta"


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        pytest.param({"max_tokens": 0}, "invalid_request", ["max_tokens is 0"], id="max_tokens 0"),
        pytest.param(
            {"max_tokens": 10**9}, "invalid_request", ["1000000000", "2045"], id="max_tokens over the limit"
        ),
        pytest.param({"prompt": [1] * 2500}, "context_length_exceeded", ["2500", "2047"], id="too long"),
        pytest.param({"prompt": []}, "invalid_request", ["empty"], id="no prompt"),
        pytest.param({"prompt": [2**31]}, "invalid_request", [str(2**31)], id="unknown token id"),
        pytest.param({"stop": ["x"] * 17}, "invalid_request", ["17", "16"], id="too many stops"),
        pytest.param({"temperature": float("nan")}, "invalid_request", ["temperature"], id="NaN"),
        pytest.param({"repetition_penalty": float("inf")}, "invalid_request", ["repetition"], id="infinity"),
        pytest.param({"logit_bias": {2**40: 1.0}}, "invalid_request", ["logit_bias"], id="bias of no token"),
        pytest.param({"stop_token_ids": [-5]}, "invalid_request", ["stop_token_ids"], id="negative stop id"),
        pytest.param({"structured_output": StructuredOutput()}, "invalid_request", ["0"], id="no constraint"),
    ],
)  # fmt: skip
def test_a_bad_submission_is_refused_with_numbers(
    fleet: Fleet, changes: dict[str, Any], code: str, words: list[str]
) -> None:
    num_done = fleet.workers()["prefill-1"]["load"]["num_prefill_tokens_done"]
    with Peer(fleet.client_port) as client:
        client.say(submission(**changes))
        refused, message = _refusal(client)
    assert refused == code, message
    assert all(word in message for word in words), message
    assert fleet.workers()["prefill-1"]["load"]["num_prefill_tokens_done"] == num_done


def test_names_of_requests_and_models_are_checked(fleet: Fleet) -> None:
    good = submission(max_tokens=1500)
    with Peer(fleet.client_port) as client:
        for changes, code in (
            ({"request_id": ""}, "invalid_request"),
            ({"request_id": "x" * 300}, "invalid_request"),
            ({"model": "gpt-x"}, "model_not_found"),
            ({"prompt": "two prompts"}, "invalid_request"),
            ({"prompt_token_ids": b"\x00" * 5}, "invalid_request"),
            ({"protocol_version": 99}, "protocol_mismatch"),
        ):
            client.say(msgspec.structs.replace(good, **changes))
            assert _refusal(client)[0] == code
        client.say(good)
        client.say(good)
        kinds = [client.hear() for _ in range(2)]
        refused = next(heard for heard in kinds if heard["type"] == "RequestRefused")
        assert refused["error"]["code"] == "duplicate_request_id"
        client.say(AbortRequest(request_id="r"))
        while client.hear()["type"] != "RequestFinished":
            pass


# ── the fleet's socket ───────────────────────────────────────────────────────────────────────


def test_a_stranger_is_not_a_worker(fleet: Fleet, tmp_path: Path) -> None:
    """What is no message is refused; a worker's word from a connection that never registered is not heard."""
    with Peer(fleet.fleet_port) as stranger:
        for frames in (
            (b"",),
            (b"a", b"b"),
            (pickle.dumps(_Pickled(tmp_path / "unpickled")),),
            (codec.encode(submission()),),
            (codec.encode(StartPrefill(handoff_id="h", request_id="r", prompt_token_ids=b"",
                                       sampling=SamplingSpec(max_tokens=1), keep_kv=True)),),
        ):  # fmt: skip
            stranger.send(*frames)
            heard = stranger.hear()
            assert (heard["type"], heard["error"]["code"]) == ("WorkerRefused", "protocol_mismatch")
        stranger.say(Heartbeat(load=WorkerLoad(num_free_blocks=5), num_legs=0))
        assert stranger.hear() == {"type": RegisterAgain.__name__}
    assert not (tmp_path / "unpickled").exists()


def test_a_forged_worker_id_is_refused(fleet: Fleet) -> None:
    real = fleet.workers()["decode-1"]
    with Peer(fleet.fleet_port) as stranger:
        stranger.say(registration_like(real, worker_id="decode-1"))
        heard = stranger.hear()
        assert (heard["type"], heard["error"]["code"]) == ("WorkerRefused", "worker_id_taken")
        assert str(real["pid"]) in heard["error"]["message"]


def test_a_registration_that_cannot_serve_is_refused_by_field(fleet: Fleet) -> None:
    real = fleet.workers()["decode-1"]
    layout = real["layout"]
    capacity = real["capacity"]
    with Peer(fleet.fleet_port) as stranger:
        for changes, words in (
            ({"protocol_version": 99}, "99"),
            ({"worker_id": ""}, "1 to 128"),
            ({"worker_id": "w" * 200}, "200"),
            ({"layout": {**layout, "block_size_tokens": 64}}, "block_size_tokens"),
            ({"layout": {**layout, "dtype": "float16"}}, "dtype"),
            ({"layout": {**layout, "model": "another"}}, "model"),
            ({"capacity": {**capacity, "num_blocks": 0}}, "num_blocks"),
            ({"capacity": {**capacity, "max_model_len": -3}}, "max_model_len"),
        ):
            fields = msgspec.to_builtins(registration_like(real)) | changes
            stranger.send(msgspec.msgpack.encode(fields))
            heard = stranger.hear()
            assert heard["type"] == "WorkerRefused", heard
            assert words in heard["error"]["message"]


def test_a_registered_stranger_cannot_speak_for_anothers_legs(fleet: Fleet) -> None:
    """
    1. a stranger joins as a decode worker of its own name, which is allowed, and says it is full
    2. it sends tokens, failures and results for a leg that another worker serves
    3. that leg's client reads what it would have read without the stranger
    """
    body = {"prompt": [3, 1, 4], "max_tokens": 1200, "temperature": 0}
    undisturbed = fleet.ask("POST", "/v1/completions", body).json["choices"]
    stream = fleet.stream("/v1/completions", {**body, "return_token_ids": True})
    events = iter(stream)
    try:
        text = next(events)["choices"][0]["text"]
        handoff_id = _latest_leg(fleet.log("decode-1"))
        capacity = {**fleet.workers()["decode-1"]["capacity"], "num_blocks": 1}
        with Peer(fleet.fleet_port) as stranger:
            join = registration_like(fleet.workers()["decode-1"])
            stranger.send(msgspec.msgpack.encode(msgspec.to_builtins(join) | {"capacity": capacity}))
            assert stranger.hear()["type"] == "WorkerAccepted"
            delta = SequenceDelta(handoff_id, [88, 88], "XX", "stop")
            error = {"code": "engine_failed", "message": "forged"}
            stranger.say(StepOutputs(deltas=[delta], load=WorkerLoad()))
            stranger.say(
                PrefillFinished(delta=delta, kv_source=None, queue_s=0.0, prefill_s=0.0, load=WorkerLoad())
            )
            forged = {"type": LegFailed.__name__, "handoff_id": handoff_id, "error": error}
            stranger.send(msgspec.msgpack.encode(forged))
            for event in events:
                assert "error" not in event, event
                text += event["choices"][0]["text"]
    finally:
        stream.close()
    assert stream.is_done
    assert text == undisturbed[0]["text"]


def _latest_leg(log: str) -> str:
    found: list[str] = re.findall(r"leg started handoff_id=(\S+)", log)
    return found[-1]


def test_registering_twice_is_one_worker(fleet: Fleet) -> None:
    real = fleet.workers()["prefill-1"]
    with Peer(fleet.fleet_port) as stranger:
        for _ in range(3):
            stranger.say(registration_like(real, worker_id="twice"))
            assert stranger.hear()["type"] == "WorkerAccepted"
        assert sum(name == "twice" for name in fleet.workers()) == 1
        stranger.say(registration_like(real, worker_id="thrice"))
        heard = stranger.hear()
        assert (heard["type"], heard["error"]["code"]) == ("WorkerRefused", "registration_refused")


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
