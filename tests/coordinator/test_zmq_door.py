"""The ZeroMQ door with its own client, over real sockets, in front of an intake made by hand."""

from __future__ import annotations

import asyncio
import contextlib
import pickle
import random
import threading
from collections.abc import AsyncIterator

import pytest

from baton.client import AsyncBatonClient, BatonClient
from baton.contract import codec
from baton.contract.errors import (
    CoordinatorLost,
    DuplicateRequest,
    InvalidRequest,
    NoWorkers,
    ProtocolMismatch,
    QueueFull,
    ServingError,
    UnknownModel,
    UnsupportedFeature,
    WorkerLost,
)
from baton.contract.lifecycle import Outcome
from baton.contract.messages import (
    Placement,
    RequestRefused,
    RequestReport,
    SequenceDelta,
    SubmitRequest,
)
from baton.contract.tokens import pack_token_ids, unpack_token_ids
from baton.wire.channels import DealerChannel
from coordinator.intake import FleetFacts, ResultSink
from coordinator.zmq_door import ZmqDoor


class EchoIntake:
    """Answers each prompt with its own tokens, one delta each; special prompts misbehave."""

    def __init__(self) -> None:
        self.running: dict[str, ResultSink] = {}
        self.aborted: list[str] = []
        self.refused: list[str] = []
        """Codes the door has told of."""
        self.submitted = asyncio.Event()

    def submit(self, submission, sink) -> None:
        token_ids = unpack_token_ids(submission.prompt_token_ids)
        if token_ids == [1]:
            raise QueueFull("4 requests are queued, the limit is 4", retry_after_s=2.0)
        if token_ids == [2]:
            raise NoWorkers("no decode worker is ready")
        if token_ids == [6]:
            raise RuntimeError("a mistake")
        self.running[submission.request_id] = sink
        self.submitted.set()
        asyncio.get_running_loop().call_soon(self._answer, submission.request_id, token_ids)

    def _answer(self, request_id: str, token_ids: list[int]) -> None:
        sink = self.running.get(request_id)
        if sink is None or token_ids == [3]:  # [3] is never answered
            return
        for token_id in token_ids:
            sink.on_delta(SequenceDelta("h", [token_id], f"<{token_id}>"), Placement())
        if token_ids == [4]:
            error = WorkerLost("worker d0 was lost", phase="decoding", worker_id="d0").report()
            report = RequestReport(outcome=Outcome.FAILED, error=error)
        else:
            report = RequestReport(outcome=Outcome.COMPLETED, num_output_tokens=len(token_ids))
        del self.running[request_id]
        sink.on_finished(report)

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)
        sink = self.running.pop(request_id, None)
        if sink is not None:
            sink.on_finished(RequestReport(outcome=Outcome.ABORTED))

    def facts(self) -> FleetFacts:
        return FleetFacts(is_ready=True, model="demo", max_model_len=64)

    def snapshot(self) -> dict[str, object]:
        return {}


class WordEncoder:
    """A word's token id is its length; answers in the next turn of the loop."""

    def encode_text(self, text, done) -> None:
        if text == "unbearable":
            raise RuntimeError("a mistake")
        if text == "unservable":
            raise UnsupportedFeature("there is no tokenizer here")
        packed = pack_token_ids([len(word) for word in text.split()])
        answer = InvalidRequest("cannot be tokenised", param="prompt") if text == "untokenisable" else packed
        asyncio.get_running_loop().call_soon(done, answer)

    def encode_chat(self, messages, done) -> None:
        self.encode_text(" ".join(str(m["content"]) for m in messages), done)

    def check_token_ids(self, packed, sampling) -> None:
        pass


class Names:
    def is_served(self, name: str) -> bool:
        return name == "demo"


@contextlib.asynccontextmanager
async def served() -> AsyncIterator[tuple[EchoIntake, str]]:
    intake = EchoIntake()
    door = ZmqDoor(intake, WordEncoder(), Names(), intake.refused.append)
    address = door.start("tcp://127.0.0.1:*")
    try:
        yield intake, address.removeprefix("tcp://")
    finally:
        door.close()


def run(scenario) -> None:
    async def main() -> None:
        async with asyncio.timeout(20), served() as (intake, address), AsyncBatonClient(address) as client:
            await scenario(intake, client)

    asyncio.run(main())


async def collect(stream) -> list[int]:
    return [token_id async for delta in stream for token_id in delta.token_ids]


def test_tokens_text_and_chat_are_three_ways_in():
    async def scenario(intake, client) -> None:
        assert await collect(client.submit([7, 8], max_tokens=4)) == [7, 8]
        assert await collect(client.submit("three little words", model="demo")) == [5, 6, 5]
        assert await collect(client.submit([{"role": "user", "content": "hello"}])) == [5]

    run(scenario)


def test_many_streams_share_one_connection():
    async def scenario(intake, client) -> None:
        streams = [client.submit([10 + i] * 5) for i in range(200)]
        answers = await asyncio.gather(*(collect(s) for s in streams))
        assert answers == [[10 + i] * 5 for i in range(200)]
        assert all(s.report.outcome is Outcome.COMPLETED for s in streams)
        assert not client._streams and not intake.running

    run(scenario)


def test_a_request_too_large_for_the_wire_is_refused_and_the_other_streams_go_on():
    """Sent, it would cost the connection, and all requests on it."""

    async def scenario(intake, client) -> None:
        waiting = client.submit([3], max_tokens=4)
        await intake.submitted.wait()
        with pytest.raises(InvalidRequest, match="the limit is 16777216"):
            await collect(client.submit("x" * 17_000_000))
        assert await collect(client.submit([7, 8], max_tokens=4)) == [7, 8]
        (sink,) = intake.running.values()
        sink.on_finished(RequestReport(outcome=Outcome.COMPLETED))
        assert await collect(waiting) == []

    run(scenario)


@pytest.mark.parametrize(
    ("prompt", "options", "error"),
    [
        pytest.param([1], {}, QueueFull, id="queue full"),
        pytest.param([2], {}, NoWorkers, id="no workers"),
        pytest.param([4], {}, WorkerLost, id="failed after its tokens"),
        pytest.param("untokenisable", {}, InvalidRequest, id="cannot be tokenised"),
        pytest.param("unservable", {}, UnsupportedFeature, id="no tokenizer"),
        pytest.param([9], {"model": "gpt-17"}, UnknownModel, id="unknown model"),
        pytest.param([6], {}, ServingError, id="a mistake of ours in the core"),
        pytest.param("unbearable", {}, ServingError, id="a mistake of ours in the encoder"),
    ],
)
def test_errors_arrive_with_their_type(prompt, options, error):
    async def scenario(intake, client) -> None:
        with pytest.raises(error):
            await collect(client.submit(prompt, **options))
        assert intake.refused == ([] if error is WorkerLost else [error.code])
        assert await collect(client.submit([7])) == [7]

    run(scenario)


def test_options_are_checked_before_anything_is_sent():
    async def scenario(intake, client) -> None:
        with pytest.raises(InvalidRequest, match="unknown option 'temprature'"):
            client.submit("x", temprature=1)
        with pytest.raises(InvalidRequest, match="max_tokens is 0"):
            client.submit("x", max_tokens=0)

    run(scenario)


def test_a_coordinator_that_is_gone_is_an_error_at_once_and_its_successor_serves():
    """
    1. one stream never gets an answer, then the coordinator is gone: the stream raises, nothing hangs
    2. until there is another one, a request raises without being sent
    3. a successor on the same port serves the next one
    """

    async def scenario() -> None:
        intake = EchoIntake()
        door = ZmqDoor(intake, WordEncoder(), Names())
        address = door.start("tcp://127.0.0.1:*")
        async with asyncio.timeout(20), AsyncBatonClient(address.removeprefix("tcp://")) as client:
            assert await collect(client.submit([7, 8])) == [7, 8]
            stream = client.submit([3])
            waiting = asyncio.create_task(collect(stream))
            assert await collect(client.submit([7])) == [7]  # so the one before it has arrived
            door.close()
            with pytest.raises(CoordinatorLost, match="connection to 127.0.0.1:.* was lost"):
                await waiting
            with pytest.raises(CoordinatorLost, match="no coordinator at"):
                client.submit([7])
            successor = ZmqDoor(EchoIntake(), WordEncoder(), Names())
            successor.start(address)
            while True:
                try:
                    assert await collect(client.submit([9])) == [9]
                    break
                except CoordinatorLost:
                    await asyncio.sleep(0.01)
            successor.close()

    asyncio.run(scenario())


def test_abort_ends_the_stream():
    async def scenario(intake, client) -> None:
        stream = client.submit([3])
        await asyncio.sleep(0)
        stream.abort()
        assert await collect(stream) == []
        assert stream.report.outcome is Outcome.ABORTED
        assert len(intake.aborted) == 1 and not intake.running

    run(scenario)


def test_a_client_that_leaves_is_noticed_at_the_next_token():
    async def scenario() -> None:
        async with asyncio.timeout(20), served() as (intake, address):
            client = AsyncBatonClient(address)
            client.submit([3])
            await intake.submitted.wait()
            client._streams.clear()  # so that closing sends no abort, as a killed process would not
            client.close()
            (sink,) = intake.running.values()
            while not intake.aborted:
                sink.on_delta(SequenceDelta("h", [1], "x"), Placement())
                await asyncio.sleep(0.01)
            assert not intake.running

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("message", "error", "sentence"),
    [
        (SubmitRequest(protocol_version=9, request_id="r"), ProtocolMismatch, "speaks protocol 9"),
        (
            SubmitRequest(protocol_version=codec.PROTOCOL_VERSION, request_id=""),
            InvalidRequest,
            "request_id has 0 characters",
        ),
        (
            SubmitRequest(protocol_version=codec.PROTOCOL_VERSION, request_id="r"),
            InvalidRequest,
            "give exactly one of",
        ),
        (
            SubmitRequest(
                protocol_version=codec.PROTOCOL_VERSION, request_id="r", prompt="a", prompt_token_ids=b"1234"
            ),
            InvalidRequest,
            "give exactly one of",
        ),
        (
            SubmitRequest(protocol_version=codec.PROTOCOL_VERSION, request_id="r", prompt_token_ids=b"12345"),
            InvalidRequest,
            "5 bytes, expected a multiple of 4",
        ),
    ],
    ids=["version", "empty id", "no prompt", "two prompts", "odd bytes"],
)
def test_a_raw_client_is_refused_by_name(message, error, sentence):
    reply = _exchange([codec.encode(message)])
    assert reply.error.code == error.code and sentence in reply.error.message


@pytest.mark.parametrize(
    "frames",
    [[b"a", b"b"], [b""], [pickle.dumps({"type": "SubmitRequest"})], [b"\x81\xa4type\xa4Boom"]],
    ids=["two frames", "empty", "pickle", "unknown type"],
)
def test_foreign_frames_are_answered_not_obeyed(frames):
    assert _exchange(frames).error.code == "protocol_mismatch"


def test_same_id_twice_is_refused():
    message = SubmitRequest(
        protocol_version=codec.PROTOCOL_VERSION, request_id="r", prompt_token_ids=pack_token_ids([3])
    )
    assert _exchange([codec.encode(message)], times=2).error.code == DuplicateRequest.code


def _exchange(frames: list[bytes], times: int = 1) -> RequestRefused:
    """What a client without our library hears first."""

    async def scenario() -> RequestRefused:
        async with asyncio.timeout(20), served() as (_, address):
            heard: asyncio.Queue[bytes] = asyncio.Queue()
            channel = DealerChannel(lambda received: heard.put_nowait(received[0]))
            channel.connect(f"tcp://{address}")
            channel.start()
            for _ in range(times):
                channel._socket.send_multipart(frames)
            reply = codec.client_replies.decode(await heard.get())
            channel.close()
            assert isinstance(reply, RequestRefused)
            return reply

    return asyncio.run(scenario())


def test_ten_thousand_random_frames_leave_the_door_serving():
    async def scenario() -> None:
        async with asyncio.timeout(60), served() as (_, address):
            rng = random.Random(3)
            vandal = DealerChannel(lambda frames: None)
            vandal.connect(f"tcp://{address}")
            vandal.start()
            good = codec.encode(
                SubmitRequest(
                    protocol_version=codec.PROTOCOL_VERSION,
                    request_id="r",
                    prompt_token_ids=pack_token_ids([9]),
                )
            )
            for i in range(10_000):
                frame = bytearray(good) if i % 2 else bytearray(rng.randbytes(rng.randint(0, 60)))
                if frame:
                    frame[rng.randrange(len(frame))] = rng.randrange(256)
                vandal.send(bytes(frame))
                if i % 500 == 0:
                    await asyncio.sleep(0)
            async with AsyncBatonClient(address) as client:
                assert await collect(client.submit([7, 7])) == [7, 7]
            vandal.close()

    asyncio.run(scenario())


def test_the_blocking_client_streams_and_generates():
    ready = threading.Event()
    found: list[tuple[str, asyncio.AbstractEventLoop, asyncio.Event]] = []

    async def serve() -> None:
        async with served() as (_, address):
            stop = asyncio.Event()
            found.append((address, asyncio.get_running_loop(), stop))
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        assert ready.wait(10)
        with BatonClient(found[0][0], timeout_s=10) as client:
            assert [d.text for d in client.stream([7, 8])] == ["<7>", "<8>"]
            done = client.generate("one three five")
            assert (done.text, done.token_ids) == ("<3><5><4>", [3, 5, 4])
            with pytest.raises(QueueFull) as refusal:
                client.generate([1])
            assert refusal.value.retry_after_s == 2.0
            for _ in client.stream([7] * 50):
                break  # leaving early aborts
    finally:
        _, loop, stop = found[0]
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
