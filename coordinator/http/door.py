"""The HTTP door as the coordinator holds it: listens, hands requests to the router, drains."""

from __future__ import annotations

import asyncio
import logging
import random
import re
from contextlib import AbstractContextManager
from email.utils import formatdate
from importlib.metadata import PackageNotFoundError, version
from typing import cast

from baton.clock import Clock, SystemClock
from baton.contract.errors import ServingError
from coordinator.http import router
from coordinator.http.exchange import Exchange, HttpRequest
from coordinator.http.limits import HttpSettings
from coordinator.http.protocol import HttpConnection
from coordinator.intake import OUR_MISTAKE, Intake
from coordinator.metrics import Metrics
from coordinator.served_names import ServedNames
from coordinator.tokenizer import FleetTokenizer

log = logging.getLogger(__name__)

_SWEEP_S = 1.0
_BACKLOG = 2048
_CLEAN_ID = re.compile(r"[A-Za-z0-9._:\-]{1,128}")
_UNCLEAN = re.compile(r"[^A-Za-z0-9._:\-]+")


class HttpDoor:
    """start → serve → stop_accepting (new work hears 503, running work goes on) → close."""

    def __init__(
        self,
        intake: Intake,
        settings: HttpSettings,
        tokenizer: FleetTokenizer,
        metrics: Metrics,
        clock: Clock | None = None,
    ) -> None:
        self.intake = intake
        self.settings = settings
        self.tokenizer = tokenizer
        self.metrics = metrics
        self.names = ServedNames(settings.served_model_names, intake)
        self.version = _version()
        self.is_draining = False
        self.connections: set[HttpConnection] = set()
        self.date_line = b""
        self._clock = clock if clock is not None else SystemClock()
        self._server: asyncio.Server | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._num_exchanges = 0
        self._idle = asyncio.Event()
        self._closed = asyncio.Event()

    async def start(self, host: str, port: int) -> int:
        """Listen; the port that was taken, for port 0. Raises OSError when the address is in use."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: HttpConnection(self), host, port, backlog=_BACKLOG)
        self._tick()
        bound = cast(int, self._server.sockets[0].getsockname()[1])
        log.info("http door listening host=%s port=%d", host, bound)
        return bound

    async def stop_accepting(self) -> None:
        """Still listens: probes must hear that it drains."""
        self.is_draining = True

    async def close(self, grace_s: float) -> None:
        """Wait up to `grace_s` for answers under way, then drop what is left and abort its work."""
        self.is_draining = True
        if self._num_exchanges and grace_s > 0:
            self._idle.clear()
            try:
                await asyncio.wait_for(self._idle.wait(), grace_s)
            except TimeoutError:
                log.warning("http door dropping requests num_requests=%d", self._num_exchanges)
        if self._timer is not None:
            self._timer.cancel()
        if self._server is not None:
            self._server.close()
        for connection in list(self.connections):
            if self._num_exchanges:
                connection.close_if_idle()
        if self._num_exchanges == 0:
            # Let what was just written leave.
            await asyncio.sleep(0)
        for connection in list(self.connections):
            connection.drop()
        if self.connections:
            self._closed.clear()
            await self._closed.wait()

    # ── for connections ───────────────────────────────────────────────────────────────────────

    def now_s(self) -> float:
        return self._clock.now_s()

    def new_exchange(self, owner: HttpConnection, request: HttpRequest) -> Exchange:
        self._num_exchanges += 1
        given = request.headers.get(b"x-request-id")
        return Exchange(owner, request, _request_id(given))

    def connection_ended(self, connection: HttpConnection) -> None:
        self.connections.discard(connection)
        if not self.connections:
            self._closed.set()

    def exchange_ended(self) -> None:
        self._num_exchanges -= 1
        if self._num_exchanges == 0:
            self._idle.set()

    def handle(self, exchange: Exchange) -> None:
        try:
            router.dispatch(self, exchange)
        except ServingError as error:
            self.refuse(exchange, error)
        except Exception:
            self.break_off(exchange)

    def refused(self, error: ServingError) -> None:
        self.metrics.on_refused(error.code)

    # ── for handlers ──────────────────────────────────────────────────────────────────────────

    def guarded(self, exchange: Exchange) -> AbstractContextManager[None]:
        return _Guard(self, exchange)

    def refuse(self, exchange: Exchange, error: ServingError) -> None:
        """Nothing was accepted; the client hears why."""
        self.refused(error)
        log.debug("request refused request_id=%s code=%s", exchange.request_id, error.code)
        exchange.fail(error)

    def break_off(self, exchange: Exchange) -> None:
        """A bug of ours, in an `except` block: this request ends, the others go on."""
        log.exception("request broke request_id=%s path=%s", exchange.request_id, exchange.request.path)
        error = ServingError(OUR_MISTAKE)
        self.refused(error)
        exchange.fail(error, must_close=True)

    def sweep(self) -> None:
        """What happens once a second: deadlines of all connections, and the date that answers carry."""
        now_s = self._clock.now_s()
        self.date_line = b"date: %b\r\n" % formatdate(usegmt=True).encode("ascii")
        for connection in list(self.connections):
            connection.check_deadlines(now_s)
            if self.is_draining:
                connection.close_if_idle()

    def _tick(self) -> None:
        self.sweep()
        self._timer = asyncio.get_running_loop().call_later(_SWEEP_S, self._tick)


class _Guard(AbstractContextManager[None]):
    """Outermost handler of a callback: what `handle` does for the first part of a request."""

    __slots__ = ("_door", "_exchange")

    def __init__(self, door: HttpDoor, exchange: Exchange) -> None:
        self._door = door
        self._exchange = exchange

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: object
    ) -> bool:
        if isinstance(error, ServingError):
            self._door.refuse(self._exchange, error)
            return True
        if isinstance(error, Exception):
            self._door.break_off(self._exchange)
            return True
        return False


def _version() -> str:
    try:
        return version("baton-serving")
    except PackageNotFoundError:
        return "uninstalled"


def _request_id(given: bytes | None) -> str:
    """The client's, cleaned of what may not stand in a header or a log line; else a new one."""
    if given:
        text = given.decode("latin-1")
        if _CLEAN_ID.fullmatch(text):
            return text
        if cleaned := _UNCLEAN.sub("", text)[:128]:
            return cleaned
    return f"{random.getrandbits(128):032x}"
