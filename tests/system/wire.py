"""Raw ZeroMQ ends for tests that say what no client or worker of ours would. Imported, not collected."""

from __future__ import annotations

from typing import Any

import msgspec
import zmq

from baton.contract import codec
from baton.contract.lifecycle import WorkerRole
from baton.contract.messages import (
    KvLayout,
    Message,
    RegisterWorker,
    SubmitRequest,
    WorkerAccepted,
    WorkerCapacity,
)
from baton.contract.sampling import SamplingSpec
from baton.contract.tokens import pack_token_ids

REPLY_TIMEOUT_S = 20.0


class Peer:
    """A DEALER that sends any frames and reads whatever comes back."""

    def __init__(self, port: int) -> None:
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.connect(f"tcp://127.0.0.1:{port}")

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *error: object) -> None:
        self._socket.close()

    def send(self, *frames: bytes) -> None:
        self._socket.send_multipart(frames)

    def say(self, message: Message) -> None:
        self.send(codec.encode(message))

    def hear(self, timeout_s: float = REPLY_TIMEOUT_S) -> dict[str, Any]:
        """The next message as plain values."""
        assert self._socket.poll(int(timeout_s * 1000)), f"nothing heard within {timeout_s:g} s"
        message: dict[str, Any] = msgspec.msgpack.decode(self._socket.recv())
        return message

    def hear_all(self) -> list[dict[str, Any]]:
        """What has arrived by now."""
        heard = []
        while self._socket.poll(0):
            heard.append(self.hear())
        return heard


class FakeCoordinator:
    """A ROUTER that one worker registers with."""

    def __init__(self) -> None:
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self.port: int = self._socket.bind_to_random_port("tcp://127.0.0.1")
        self._peer = b""

    def accept(self, timeout_s: float = 60.0) -> None:
        """Wait for the worker's registration."""
        while self.hear(timeout_s)["type"] != "RegisterWorker":
            pass
        self.say(
            WorkerAccepted(
                protocol_version=codec.PROTOCOL_VERSION, coordinator_boot_id="c", heartbeat_interval_s=0.05
            )
        )

    def hear(self, timeout_s: float = REPLY_TIMEOUT_S) -> dict[str, Any]:
        assert self._socket.poll(int(timeout_s * 1000)), f"nothing heard within {timeout_s:g} s"
        self._peer, frame = self._socket.recv_multipart()
        message: dict[str, Any] = msgspec.msgpack.decode(frame)
        return message

    def send(self, *frames: bytes) -> None:
        self._socket.send_multipart([self._peer, *frames])

    def say(self, message: Message) -> None:
        self.send(codec.encode(message))

    def close(self) -> None:
        self._socket.close()


def submission(request_id: str = "r", prompt: Any = (1, 2, 3), **sampling: Any) -> SubmitRequest:
    return SubmitRequest(
        protocol_version=codec.PROTOCOL_VERSION,
        request_id=request_id,
        prompt_token_ids=pack_token_ids(prompt),
        sampling=SamplingSpec(**{"max_tokens": 4, "ignore_eos": True} | sampling),
    )


def registration_like(worker: dict[str, Any], **changes: Any) -> RegisterWorker:
    """A registration that fits beside a worker of GET /fleet."""
    fields: dict[str, Any] = {
        "protocol_version": codec.PROTOCOL_VERSION,
        "worker_id": "stranger",
        "boot_id": "stranger's",
        "role": WorkerRole(worker["role"]),
        "layout": msgspec.convert(worker["layout"], KvLayout),
        "capacity": msgspec.convert(worker["capacity"], WorkerCapacity),
        "tensor_parallel_size": 1,
        "pipeline_parallel_size": 1,
        "transfer_endpoint": "127.0.0.1:1",
        "host": "127.0.0.1",
        "pid": 1,
    }
    return RegisterWorker(**fields | changes)
