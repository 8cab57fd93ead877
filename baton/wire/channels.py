"""ZeroMQ sockets as callbacks on an asyncio loop.

zmq.asyncio costs a future and a task switch per message; a token stream cannot afford that. Here
the socket's file descriptor is watched by the loop and every ready message is handed to a plain
function. The descriptor is edge-triggered: it may stay silent although messages wait, so the
queue is drained until empty after every wake-up and looked at again after every send. Also after a
callback that raised: its own message is lost, those behind it are not.

Queues: each socket holds at most QUEUE_MESSAGES per peer and direction. When a send finds the
queue full, `send` answers False and nothing was sent; the caller decides (the coordinator gives
the peer up, a worker does the same with the coordinator).
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Callable

import zmq
from zmq.utils.monitor import recv_monitor_message

from baton.contract.codec import MAX_MESSAGE_BYTES

QUEUE_MESSAGES = 65_536
"""Deep enough for a minute of one message per 1 ms step; a peer that lags more is as good as gone."""

DRAIN_BATCH, DRAIN_S = 256, 0.01
"""Messages handled, and time spent on them, before the loop gets a turn, so that one busy peer cannot
starve the doors. A worker that tells its whole prefix cache sends hundreds that take milliseconds each."""

KEEPALIVE_MS = 2_000

LET_GO_S = (0.05, 0.5)
"""ZeroMQ tells the end of a connection just before its socket lets go of that peer: a message sent in
between still goes to nobody. So it is told again after these delays."""


class _Channel(ABC):
    def __init__(self, kind: int, context: zmq.Context[zmq.Socket[bytes]] | None) -> None:
        self._context = context or zmq.Context.instance()
        self._socket: zmq.Socket[bytes] = self._context.socket(kind)
        for option, value in (
            (zmq.LINGER, 0),
            (zmq.SNDHWM, QUEUE_MESSAGES),
            (zmq.RCVHWM, QUEUE_MESSAGES),
            (zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES),
            (zmq.HEARTBEAT_IVL, KEEPALIVE_MS),
            (zmq.HEARTBEAT_TIMEOUT, 3 * KEEPALIVE_MS),
        ):
            self._socket.setsockopt(option, value)
        self._fd = int(self._socket.getsockopt(zmq.FD))
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wakeup: asyncio.Handle | None = None

    def start(self) -> None:
        """Begin to deliver; call on the loop that will run the callbacks."""
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._fd, self._drain)
        self._drain_soon()

    def close(self, linger_ms: int = 0) -> None:
        """Stop delivering. Messages not yet sent get `linger_ms` to leave."""
        if self._socket.closed:
            return
        if self._loop is not None:
            self._loop.remove_reader(self._fd)
        if self._wakeup is not None:
            self._wakeup.cancel()
        self._socket.close(linger=linger_ms)

    def _allow_ipv6(self, address: str) -> None:
        self._socket.setsockopt(zmq.IPV6, address.startswith("tcp://["))

    def _drain_soon(self) -> None:
        if self._loop is not None and self._wakeup is None:
            self._wakeup = self._loop.call_soon(self._drain)

    def _after_send(self) -> None:
        """Also after one that failed: ZeroMQ looked at its mailbox, and the descriptor is quiet now."""
        if not self._socket.closed and self._wakeup is None:
            self._has_unread()

    def _has_unread(self) -> bool:
        """To look quiets the descriptor, so what is found is delivered soon without it."""
        has_unread = bool(int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN)
        if has_unread:
            self._drain_soon()
        return has_unread

    def _drain(self) -> None:
        self._wakeup = None
        end_s = time.monotonic() + DRAIN_S
        for _ in range(DRAIN_BATCH):
            if self._socket.closed:
                return
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                self._deliver(frames)
            except BaseException:
                self._drain_soon()
                raise
            if time.monotonic() >= end_s:
                break
        self._drain_soon()

    @abstractmethod
    def _deliver(self, frames: list[bytes]) -> None:
        """One message as it came, envelope and all."""


class RouterChannel(_Channel):
    """The coordinator's side: many peers, told apart by the identity ZeroMQ gives a connection."""

    def __init__(
        self,
        on_frames: Callable[[bytes, list[bytes]], None],
        context: zmq.Context[zmq.Socket[bytes]] | None = None,
        *,
        on_disconnect: Callable[[], None] | None = None,
    ) -> None:
        """on_frames(peer, frames): frames without the identity; a well-formed message has one.
        on_disconnect(): some connection has ended. ZeroMQ does not say whose; a `send` to it fails, perhaps
        only a moment later, so this is called again after each of LET_GO_S."""
        super().__init__(zmq.ROUTER, context)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._on_frames = on_frames
        self._on_disconnect = on_disconnect
        self._monitor: zmq.Socket[bytes] | None = None
        self._told_again: list[asyncio.TimerHandle] = []
        if on_disconnect is not None:
            self._monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)

    def start(self) -> None:
        super().start()
        if self._monitor is not None and self._loop is not None:
            self._loop.add_reader(int(self._monitor.getsockopt(zmq.FD)), self._read_monitor)
            self._read_monitor()

    def close(self, linger_ms: int = 0) -> None:
        if self._monitor is not None:
            if self._loop is not None:
                self._loop.remove_reader(int(self._monitor.getsockopt(zmq.FD)))
            self._socket.disable_monitor()
            self._monitor.close(linger=0)
            self._monitor = None
        self._cancel_told_again()
        super().close(linger_ms)

    def _cancel_told_again(self) -> None:
        for handle in self._told_again:
            handle.cancel()

    def _read_monitor(self) -> None:
        has_ended = False
        while self._monitor is not None:
            try:
                self._monitor.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            has_ended = True
        if has_ended and self._on_disconnect is not None and self._loop is not None:
            self._cancel_told_again()
            self._told_again = [self._loop.call_later(delay_s, self._on_disconnect) for delay_s in LET_GO_S]
            self._on_disconnect()

    def bind(self, address: str) -> str:
        """Returns the address with the real port. Raises OSError naming an address that is taken."""
        self._allow_ipv6(address)
        try:
            self._socket.bind(address)
        except zmq.ZMQError as error:
            raise OSError(error.errno, f"cannot listen on {address}: {error}") from error
        return self._socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def send(self, peer: bytes, frame: bytes) -> bool:
        """False: the peer is gone or its queue is full; nothing was sent."""
        try:
            self._socket.send_multipart((peer, frame), zmq.NOBLOCK)
        except (zmq.Again, zmq.ZMQError):
            return False
        finally:
            self._after_send()
        return True

    def _deliver(self, frames: list[bytes]) -> None:
        self._on_frames(frames[0], frames[1:])


class DealerChannel(_Channel):
    """A worker's or client's side: one coordinator, reconnected to by ZeroMQ itself. (An engine that
    answers questions about its KV events is spoken to the same way.)

    ZeroMQ reconnects without a word, to whoever listens there now. Who must know that the process it spoke
    with is gone gives `on_disconnected`.
    """

    def __init__(
        self,
        on_frames: Callable[[list[bytes]], None],
        context: zmq.Context[zmq.Socket[bytes]] | None = None,
        *,
        on_disconnected: Callable[[], None] | None = None,
        on_connected: Callable[[], None] | None = None,
    ) -> None:
        """`on_disconnected()`: a connection that stood is gone; called after everything that had arrived
        over it was delivered. `on_connected()`: one stands; called before anything that arrives over it."""
        super().__init__(zmq.DEALER, context)
        self._socket.setsockopt(zmq.RECONNECT_IVL, 100)
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1_000)
        self._on_frames = on_frames
        self._watch: _ConnectionWatch | None = None
        if on_disconnected is not None:
            self._watch = _ConnectionWatch(
                self._socket, self._has_unread, on_connected or _ignore, on_disconnected
            )

    def start(self) -> None:
        super().start()
        if self._watch is not None:
            self._watch.start()

    def close(self, linger_ms: int = 0) -> None:
        if self._watch is not None:
            self._watch.close()
        super().close(linger_ms)

    def connect(self, address: str) -> None:
        self._allow_ipv6(address)
        self._socket.connect(address)

    def send(self, *frames: bytes) -> bool:
        """One message. False: the queue to the other side is full; nothing was sent."""
        try:
            self._socket.send_multipart(frames, zmq.NOBLOCK)
        except zmq.Again:
            return False
        finally:
            self._after_send()
        return True

    def _drain(self) -> None:
        if self._watch is not None and not self._watch.is_connected:
            self._watch.look()  # the descriptor of messages may be the first to wake the loop
        super()._drain()

    def _deliver(self, frames: list[bytes]) -> None:
        self._on_frames(frames)


def _ignore() -> None:
    pass


class _ConnectionWatch:
    """Tells when the one connection of a socket comes and goes, in order with its messages."""

    def __init__(
        self,
        socket: zmq.Socket[bytes],
        has_unread: Callable[[], bool],
        on_connected: Callable[[], None],
        on_disconnected: Callable[[], None],
    ) -> None:
        self._watched = socket
        self._has_unread = has_unread
        self._monitor = socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
        self._fd = int(self._monitor.getsockopt(zmq.FD))
        self._on_connected = on_connected
        self._on_disconnected = on_disconnected
        self.is_connected = False
        """As far as it was told."""
        self._untold: list[int] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_closed = False

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._fd, self.look)
        self._loop.call_soon(self.look)

    def close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        if self._loop is not None:
            self._loop.remove_reader(self._fd)
        self._watched.disable_monitor()
        self._monitor.close(linger=0)

    def look(self) -> None:
        """Tell what has happened since the last look."""
        assert self._loop is not None
        while not self._is_closed:
            try:
                self._untold.append(int(recv_monitor_message(self._monitor, zmq.NOBLOCK)["event"]))
            except zmq.Again:
                break
        while self._untold and not self._is_closed:
            is_connected = self._untold[0] == zmq.EVENT_HANDSHAKE_SUCCEEDED
            if not is_connected and self._has_unread():
                self._loop.call_soon(self.look)  # what arrived before the end goes first
                return
            del self._untold[0]
            self.is_connected = is_connected
            (self._on_connected if is_connected else self._on_disconnected)()


class SubscriberChannel(_Channel):
    """Everything one publisher says. What it says while its queue to us is full is lost."""

    def __init__(
        self,
        on_frames: Callable[[list[bytes]], None],
        context: zmq.Context[zmq.Socket[bytes]] | None = None,
    ) -> None:
        super().__init__(zmq.SUB, context)
        self._socket.setsockopt(zmq.SUBSCRIBE, b"")
        self._on_frames = on_frames

    def connect(self, address: str) -> None:
        self._allow_ipv6(address)
        self._socket.connect(address)

    def _deliver(self, frames: list[bytes]) -> None:
        self._on_frames(frames)
