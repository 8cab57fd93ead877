"""Bad input over the ZeroMQ door and the fleet's socket: a clear error each, nothing held, still serving."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from baton.contract import codec
from baton.contract.messages import (
    AbortLeg,
    AbortRequest,
    Heartbeat,
    LegFailed,
    PrefillFinished,
    RegisterAgain,
    SequenceDelta,
    StartPrefill,
    StepOutputs,
    WorkerLoad,
)
from baton.contract.sampling import SamplingSpec, StructuredOutput
from tests.system.fleet import Fleet
from tests.system.wire import Peer, registration_like, submission

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
