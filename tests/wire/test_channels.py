"""Frames over real sockets on loopback."""

from __future__ import annotations

import asyncio
import errno
import select
import time
from itertools import pairwise

import pytest
import zmq

from baton.ports import free_port, is_port_free
from baton.wire.channels import DRAIN_BATCH, DealerChannel, RouterChannel
from baton.wire.endpoints import parse_address, tcp


class Inbox:
    def __init__(self) -> None:
        self.items: list[tuple[bytes, list[bytes]]] = []
        self._changed = asyncio.Event()

    def from_peer(self, peer: bytes, frames: list[bytes]) -> None:
        self.items.append((peer, frames))
        self._changed.set()

    def plain(self, frames: list[bytes]) -> None:
        self.from_peer(b"", frames)

    async def wait_for(self, count: int) -> None:
        async with asyncio.timeout(10):
            while len(self.items) < count:
                self._changed.clear()
                await self._changed.wait()


def test_a_connection_is_told_before_what_arrived_over_it_however_late_the_loop_looks():
    """The other side has answered before our loop turns once: its messages and the news wait together."""

    def answer_hello(router: zmq.Socket[bytes]) -> None:
        identity, _ = router.recv_multipart()
        for number in range(3):
            router.send_multipart((identity, b"%d" % number))
        time.sleep(0.2)  # they are at our socket when the loop goes on

    async def scenario() -> None:
        story = Inbox()
        with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
            port = router.bind_to_random_port("tcp://127.0.0.1")
            dealer = DealerChannel(
                story.plain,
                on_connected=lambda: story.plain([b"connected"]),
                on_disconnected=lambda: story.plain([b"lost"]),
            )
            dealer.connect(tcp("127.0.0.1", port))
            dealer.start()
            dealer.send(b"hello")
            answer_hello(router)
            await story.wait_for(4)
            assert [frames for _, frames in story.items] == [[b"connected"], [b"0"], [b"1"], [b"2"]]
            dealer.close()

    asyncio.run(scenario())


def test_a_lost_connection_is_told_after_its_last_message_and_so_is_the_next_one():
    """
    1. connected, told so; many messages arrive, then the other side is gone: told after the last of them
    2. somebody else listens there: connected again, without a word from us
    """
    count = 3 * DRAIN_BATCH

    async def scenario() -> None:
        there, story = Inbox(), Inbox()
        router = RouterChannel(there.from_peer)
        dealer = DealerChannel(
            story.plain,
            on_connected=lambda: story.plain([b"connected"]),
            on_disconnected=lambda: story.plain([b"lost"]),
        )
        address = router.bind("tcp://127.0.0.1:*")
        dealer.connect(address)
        router.start()
        dealer.start()
        dealer.send(b"hello")
        await there.wait_for(1)
        for number in range(count):
            assert router.send(there.items[0][0], b"%d" % number)
        router.close(linger_ms=1000)
        await story.wait_for(count + 2)
        numbers = [[b"%d" % number] for number in range(count)]
        assert [frames for _, frames in story.items] == [[b"connected"], *numbers, [b"lost"]]
        router = RouterChannel(there.from_peer)
        router.bind(address)
        router.start()
        await story.wait_for(count + 3)
        assert story.items[-1][1] == [b"connected"]
        dealer.close()
        router.close()

    asyncio.run(scenario())


def test_messages_go_both_ways_and_none_is_left_behind():
    """More messages than one drain takes, sent in one go: the edge-triggered descriptor must not
    leave the rest lying."""
    count = 3 * DRAIN_BATCH + 7

    async def scenario() -> None:
        there, back = Inbox(), Inbox()
        router, dealer = RouterChannel(there.from_peer), DealerChannel(back.plain)
        dealer.connect(router.bind("tcp://127.0.0.1:*"))
        router.start()
        dealer.start()
        for i in range(count):
            assert dealer.send(b"%d" % i)
        await there.wait_for(count)
        assert [frames for _, frames in there.items] == [[b"%d" % i] for i in range(count)]
        peer = there.items[0][0]
        for i in range(count):
            assert router.send(peer, b"%d" % i)
        await back.wait_for(count)
        dealer.close()
        router.close()

    asyncio.run(scenario())


def test_slow_messages_leave_the_loop_turns():
    """Of 20 messages that take 5 ms each, no more than a few are handled between two turns."""

    async def scenario() -> None:
        turns: list[int] = []
        inbox = Inbox()

        def slowly(peer: bytes, frames: list[bytes]) -> None:
            end_s = time.monotonic() + 0.005
            while time.monotonic() < end_s:
                pass
            if not inbox.items:  # from now on, count what the loop sees
                turn()
            inbox.from_peer(peer, frames)

        def turn() -> None:
            turns.append(len(inbox.items))
            if len(inbox.items) < 20:
                asyncio.get_running_loop().call_soon(turn)

        router, dealer = RouterChannel(slowly), DealerChannel(Inbox().plain)
        dealer.connect(router.bind("tcp://127.0.0.1:*"))
        for i in range(20):
            assert dealer.send(b"%d" % i)
        await asyncio.sleep(0.2)  # all have arrived
        router.start()
        await inbox.wait_for(20)
        dealer.close()
        router.close()
        assert max(after - before for before, after in pairwise(turns)) <= 6

    asyncio.run(scenario())


def test_a_callback_that_raises_leaves_nothing_behind_it_lying():
    async def scenario() -> None:
        inbox, errors = Inbox(), []
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: errors.append(context))

        def moody(peer: bytes, frames: list[bytes]) -> None:
            if frames != [b"7"]:
                raise RuntimeError("moody")
            inbox.from_peer(peer, frames)

        router, dealer = RouterChannel(moody), DealerChannel(Inbox().plain)
        dealer.connect(router.bind("tcp://127.0.0.1:*"))
        for i in range(8):
            assert dealer.send(b"%d" % i)
        await asyncio.sleep(0.2)
        router.start()
        await inbox.wait_for(1)
        dealer.close()
        router.close()
        assert [str(context["exception"]) for context in errors] == ["moody"] * 7

    asyncio.run(scenario())


def test_a_reply_that_arrives_while_sending_is_not_forgotten():
    """Ping-pong: each side only ever sends from its own callback."""

    async def scenario() -> None:
        done = asyncio.Event()

        def ping(peer: bytes, frames: list[bytes]) -> None:
            router.send(peer, frames[0])

        router = RouterChannel(ping)

        def pong(frames: list[bytes]) -> None:
            n = int(frames[0])
            if n == 500:
                done.set()
            else:
                dealer.send(b"%d" % (n + 1))

        dealer = DealerChannel(pong)
        dealer.connect(router.bind("tcp://127.0.0.1:*"))
        router.start()
        dealer.start()
        dealer.send(b"0")
        async with asyncio.timeout(10):
            await done.wait()
        dealer.close()
        router.close()

    asyncio.run(scenario())


def test_sending_to_a_peer_that_is_not_there_says_so():
    async def scenario() -> None:
        router = RouterChannel(lambda peer, frames: None)
        router.bind("tcp://127.0.0.1:*")
        router.start()
        assert not router.send(b"nobody", b"x")
        router.close()

    asyncio.run(scenario())


def test_a_message_that_came_before_a_send_that_fails_is_not_forgotten():
    """A failed send uses the descriptor's one signal up just as a good one does."""

    async def scenario() -> None:
        there = Inbox()
        router, dealer = RouterChannel(there.from_peer), DealerChannel(lambda frames: None)
        dealer.connect(router.bind("tcp://127.0.0.1:*"))
        router.start()
        dealer.start()
        dealer.send(b"first")
        await there.wait_for(1)
        dealer.send(b"second")
        select.select([router._fd], [], [], 5)  # it has arrived, the loop has not looked yet
        assert not router.send(b"nobody", b"x")
        await there.wait_for(2)
        dealer.close()
        router.close()

    asyncio.run(scenario())


def test_a_taken_address_is_named():
    async def scenario() -> None:
        first, second = (RouterChannel(lambda peer, frames: None) for _ in range(2))
        address = first.bind("tcp://127.0.0.1:*")
        with pytest.raises(OSError, match=r"cannot listen on tcp://127\.0\.0\.1") as refusal:
            second.bind(address)
        assert refusal.value.errno == errno.EADDRINUSE
        first.close()
        second.close()

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("host:1234", ("host", 1234)),
        ("tcp://10.0.0.1:7", ("10.0.0.1", 7)),
        ("host", ("host", 5570)),
        ("[::1]:8", ("::1", 8)),
        ("[::1]", ("::1", 5570)),
    ],
)
def test_addresses(text, parsed):
    assert parse_address(text, 5570) == parsed


@pytest.mark.parametrize("text", ["", ":80", "host:port", "host:0", "host:70000"])
def test_bad_addresses_are_quoted(text):
    with pytest.raises(ValueError, match="not an address of the form host:port"):
        parse_address(text, 5570)


def test_tcp_brackets_ipv6():
    assert tcp("::1", 5) == "tcp://[::1]:5" and tcp("h", 5) == "tcp://h:5"


def test_free_port_is_free():
    assert is_port_free("127.0.0.1", free_port())


def test_a_connection_that_ends_is_told_and_its_peer_cannot_be_reached():
    """
    1. two peers; one goes: the router hears that some connection ended
    2. a send tells which: the one that went fails, the other arrives
    """

    async def scenario() -> None:
        there, here = Inbox(), Inbox()
        ended = asyncio.Event()
        router = RouterChannel(there.from_peer, on_disconnect=ended.set)
        address = router.bind("tcp://127.0.0.1:*")
        router.start()
        peers = {}
        dealers = [DealerChannel(here.plain) for _ in range(2)]
        for number, dealer in enumerate(dealers):
            dealer.connect(address)
            dealer.start()
            assert dealer.send(b"hello")
            await there.wait_for(number + 1)
            peers[number] = there.items[-1][0]
        assert not ended.is_set()
        dealers[0].close()
        async with asyncio.timeout(10):
            await ended.wait()
            while router.send(peers[0], b"there?"):
                ended.clear()
                await ended.wait()  # told again once ZeroMQ has let go of it
        assert router.send(peers[1], b"there?")
        await here.wait_for(1)
        dealers[1].close()
        router.close()

    asyncio.run(scenario())
