"""Random schedules of a whole fleet around the real coordinator: workers that answer as engines do, each over
a connection of its own that keeps order and breaks when its process dies; legs that fail, tokens that are
late, clients that leave, workers that join, leave, die and come back, in any order. Afterwards nothing more
goes wrong, and every request that was accepted must end soon, once, with the tokens of an unbroken run; no
worker may be left with a leg that nobody waits for.

`test_core_random` breaks the rules of the wire (messages lost, doubled, reordered). Here they hold, so more
must hold: at no time does a worker serve a leg that nobody knows of, and nobody waits for a deadline to be
served."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field, replace
from typing import Any
from zlib import crc32

import msgspec
import pytest

from baton.clock import ManualClock
from baton.contract import codec
from baton.contract.errors import ErrorReport, ServingError
from baton.contract.lifecycle import Outcome, WorkerRole
from baton.contract.messages import (
    AbortLeg,
    AskKvReplay,
    Heartbeat,
    JoinTestPassed,
    KvEvents,
    KvSource,
    LegFailed,
    NoMoreLegs,
    PrefillFinished,
    RegisterAgain,
    SequenceDelta,
    StartDecode,
    StartPrefill,
    StepOutputs,
    TopLogprob,
    WorkerAccepted,
    WorkerLeaving,
    WorkerLoad,
    WorkerRefused,
)
from baton.contract.sampling import SamplingSpec, ServiceWish, StructuredOutput
from baton.contract.tokens import num_token_ids, pack_token_ids, unpack_token_ids
from baton.policy import registry
from baton.worker.kv_journal import KvJournal
from coordinator.app import Coordinator
from coordinator.core import Core, CoreSettings
from coordinator.given_pace import given_pace
from coordinator.intake import Submission
from tests.policy.engine_model import EngineModel

NUM_SEEDS = 50
P, D, B = WorkerRole.PREFILL, WorkerRole.DECODE, WorkerRole.BOTH

END_TOKENS = 40
"""Of a thousand: these end an answer."""


def next_token(packed):
    return crc32(packed) % 1000


def unbroken(packed, num_tokens):
    tokens: list[int] = []
    for _ in range(num_tokens):
        tokens.append(next_token(packed + pack_token_ids(tokens)))
    return tokens


def logprobs(token, spec):
    return None if spec.logprobs is None else [[TopLogprob(token, -0.1, 1, None)]]


@dataclass
class Leg:
    order: StartPrefill | StartDecode
    tokens: list[int] = field(default_factory=list)
    is_fed: bool = False
    """Its KV is here."""


class Process:
    """A worker's process: one engine, one connection at a time."""

    def __init__(self, fleet, worker_id, role, registration):
        self.fleet, self.rng = fleet, fleet.rng
        self.worker_id = worker_id
        self.registration = msgspec.structs.replace(
            registration(worker_id, role, num_blocks=fleet.rng.choice([9, 24]), max_batch_size=4),
            boot_id=f"{fleet.rng.random()}", has_kv_events=fleet.has_kv_events,
            stream_params=fleet.rng.choice([None, {}, {}]),
            streams_first_token=fleet.rng.random() < 0.7, prefill_window_tokens=fleet.rng.choice([None, 64]),
        )  # fmt: skip
        self.legs: dict[str, Leg] = {}
        self.holds: set[str] = set()
        self.ended: set[str] = set()
        self.is_registered = self.is_draining = self.is_dismissed = self.is_dead = False
        self.engine, self.journal = EngineModel(24, 16), KvJournal()
        self.num_computed = 0
        self.connect()

    def connect(self):
        self.peer = f"{self.worker_id}/{self.fleet.number()}".encode()
        self.inbox: deque[Any] = deque()
        self.outbox: deque[Any] = deque()
        self.fleet.processes[self.peer] = self
        self.is_registered = False
        self.outbox.append(self.registration)

    def say(self, message):
        if self.is_registered:
            self.outbox.append(message)

    @property
    def load(self):
        return WorkerLoad(num_running=len(self.legs), num_prefill_tokens_done=self.num_computed)

    # ── what it is told ──────────────────────────────────────────────────────────────────────

    def hear(self):
        match message := self.inbox.popleft():
            case WorkerAccepted():
                self.is_registered = True
                for batch in self.journal.fresh_start():
                    self.tell_events(batch)
                if self.is_draining:
                    self.say(WorkerLeaving(reason="drain"))
            case RegisterAgain():
                self.lose_coordinator()
            case WorkerRefused():
                assert message.error.code == "worker_id_taken", message
                self.connect()  # and tries again
            case StartPrefill() | StartDecode():
                assert message.handoff_id not in self.legs and message.handoff_id not in self.ended
                self.legs[message.handoff_id] = Leg(message)
            case AbortLeg():
                self.end(message.handoff_id)
                self.holds.discard(message.handoff_id)
            case JoinTestPassed():
                self.registration = msgspec.structs.replace(self.registration, has_passed_join_test=True)
            case NoMoreLegs():
                assert all(name.startswith("join-") for name in self.legs), "there is more to do"
                self.is_dismissed = True
            case AskKvReplay():
                for batch in self.journal.again(message.first, message.last):
                    self.tell_events(batch)

    def lose_coordinator(self):
        self.ended |= self.legs.keys()
        self.legs.clear()
        self.holds.clear()
        self.connect()

    def end(self, handoff_id):
        if self.legs.pop(handoff_id, None) is not None:
            self.ended.add(handoff_id)

    # ── what its engine does ─────────────────────────────────────────────────────────────────

    def step(self):
        """Something of some of its legs."""
        deltas = []
        for leg in list(self.legs.values()):
            if self.rng.random() < 0.5:
                continue
            if isinstance(leg.order, StartPrefill):
                self.prefill(leg.order)
            elif (delta := self.decode(leg)) is not None:
                deltas.append(delta)
        if deltas:
            self.say(StepOutputs(deltas=deltas, load=self.load))
        if self.is_dismissed and not self.legs:
            self.say(WorkerLeaving(reason="drained"))
            self.is_dead = True  # once that is said

    def compute(self, order):
        tokens = unpack_token_ids(order.prompt_token_ids)
        num_cached = 16 * self.engine.num_hit_blocks(tokens)
        if self.engine.start(order.handoff_id, tokens):
            self.engine.finish(order.handoff_id)
        self.num_computed += len(tokens) - num_cached
        if events := list(self.engine.take_events()):
            self.tell_events(self.journal.append(events))
        return num_cached

    def tell_events(self, batch):
        if self.fleet.has_kv_events:
            self.say(
                KvEvents(
                    sequence=batch.sequence,
                    events=batch.events,
                    load=self.load,
                    is_fresh_start=batch.is_fresh_start,
                )
            )

    def prefill(self, order):
        token = next_token(order.prompt_token_ids)
        spec = order.sampling
        num_cached = self.compute(order)
        is_over = spec.max_tokens == 1 or (token < END_TOKENS and not spec.ignore_eos)
        finish = None
        if is_over and not (spec.ignore_eos and order.keep_kv):
            finish = "stop" if token < END_TOKENS and not spec.ignore_eos else "length"
        if finish is None and order.keep_kv:
            self.holds.add(order.handoff_id)
        self.end(order.handoff_id)
        source = KvSource(
            lease_s=30.0, num_tokens=num_token_ids(order.prompt_token_ids), num_bytes=1024,
            transfer_params={"at": self.peer.decode()},
        )  # fmt: skip
        text = "x" if token % 7 else ""
        delta = SequenceDelta(order.handoff_id, [token], text, finish, logprobs=logprobs(token, spec),
                              num_cached_tokens=num_cached)  # fmt: skip
        self.say(
            PrefillFinished(
                delta=delta,
                kv_source=source if finish is None and order.keep_kv else None,
                queue_s=0.0,
                prefill_s=0.01,
                load=self.load,
            )
        )

    def decode(self, leg):
        """None: nothing to tell in this step."""
        order, handoff_id = leg.order, leg.order.handoff_id
        has_lost_kv = False
        if not leg.is_fed and order.kv_source is None:
            self.compute(order)
            leg.is_fed = True
        if not leg.is_fed:
            holders = [p for p in self.fleet.alive() if p is not self and handoff_id in p.holds]
            sources = [p for p in self.fleet.alive() if p is not self and handoff_id in p.legs]
            if holders:
                holders[0].holds.discard(handoff_id)
                leg.is_fed = True
            elif not order.kv_source.is_streamed or not sources:
                if order.kv_source.is_streamed and self.fleet.is_on_its_way(handoff_id):
                    return None
                if self.rng.random() < 0.5:
                    self.fail(handoff_id, "kv_transfer_failed")
                    return None
                self.compute(order)
                leg.is_fed = has_lost_kv = True
            else:
                return None
        tokens = []
        for _ in range(self.rng.choice([1, 1, 3])):
            token = next_token(order.prompt_token_ids + pack_token_ids(leg.tokens))
            leg.tokens.append(token)
            tokens.append(token)
            is_stop = token < END_TOKENS and not order.sampling.ignore_eos
            is_last = len(leg.tokens) == order.sampling.max_tokens or is_stop
            if is_last:
                self.end(handoff_id)
                break
        text = "".join("x" if token % 7 else "" for token in tokens)
        lists = [logprobs(token, order.sampling)[0] for token in tokens] if order.sampling.logprobs else None
        return SequenceDelta(handoff_id, tokens, text, ("stop" if is_stop else "length") if is_last else None,
                             logprobs=lists, has_lost_kv=has_lost_kv)  # fmt: skip

    def fail(self, handoff_id, code):
        self.end(handoff_id)
        self.holds.discard(handoff_id)
        self.say(LegFailed(handoff_id=handoff_id, error=ErrorReport(code=code, message="it broke")))


class Client:
    def __init__(self, submission):
        self.submission = submission
        self.token_ids, self.text, self.reports = [], "", []

    def on_delta(self, delta, placement):
        assert not self.reports, "a token after the end"
        self.token_ids += delta.token_ids
        self.text += delta.text

    def on_finished(self, report):
        self.reports.append(report)


class Fleet:
    def __init__(self, rng, registration):
        self.rng = rng
        self.registration = registration
        self.has_kv_events = rng.random() < 0.5
        self.num = 0
        self.processes: dict[bytes, Process] = {}
        self.workers: dict[str, Process] = {}
        pace = replace(given_pace("H100:Llama-3.1-8B"), handoff_s=1.0)  # worth staying for
        self.core = Core(
            CoreSettings(
                max_queued=12, pace=pace if rng.random() < 0.5 else None, tests_joins=rng.random() < 0.5,
                keeps_records=rng.random() < 0.3, kv_index_bytes=1 << 20, max_attempts=rng.choice([1, 3, 3]),
                transfer_failure_policy=rng.choice(["recompute", "recompute", "fail"]),
            ),
            registry.by_name(registry.DEFAULT_PREFILL), registry.by_name(registry.DEFAULT_DECODE), "b",
        )  # fmt: skip
        self.clock = ManualClock()
        self.app = Coordinator(
            self.core, self.clock, boot_id="b", heartbeat_interval_s=1.0, heartbeat_timeout_s=5.0
        )
        self.app._fleet_channel.close()
        channel: Any = self
        self.app._fleet_channel = channel
        self.clients: dict[str, Client] = {}

    def number(self):
        self.num += 1
        return self.num

    def send(self, peer, frame):
        process = self.processes.get(peer)
        if process is None or process.is_dead or process.peer != peer:
            return False
        process.inbox.append(codec.coordinator_messages.decode(frame))
        return True

    def alive(self):
        return [p for p in self.workers.values() if not p.is_dead]

    def is_on_its_way(self, handoff_id):
        """An order to compute it has not been read yet."""
        return any(
            isinstance(m, StartPrefill) and m.handoff_id == handoff_id for p in self.alive() for m in p.inbox
        )

    # ── things that happen ───────────────────────────────────────────────────────────────────

    def start(self, worker_id):
        role = {"p": P, "d": D, "b": B}[worker_id[0]]
        self.workers[worker_id] = Process(self, worker_id, role, self.registration)

    def deliver(self, process):
        """One message to the coordinator, from a living process or the last words of one."""
        if process.outbox:
            self.app._on_worker_frames(process.peer, [codec.encode(process.outbox.popleft())])

    def submit(self):
        rng = self.rng
        spec = SamplingSpec(
            max_tokens=rng.choice([1, 2, 3, 9, 30]),
            seed=rng.choice([None, None, None, 1]),
            stop=rng.choice([[], [], ["zzz"]]),
            logprobs=rng.choice([None, None, 1]),
            presence_penalty=rng.choice([0.0, 0.0, 0.0, 1.0]),
            structured_output=rng.choice([None, None, None, StructuredOutput(regex="x*")]),
            service=rng.choice([None, None, None, ServiceWish(deadline_s=rng.choice([0.3, 60.0]))]),
        )
        prefix = rng.choice([[], range(48), range(100, 116)])
        prompt = [*prefix, *(rng.randrange(1000) for _ in range(rng.randint(1, 40)))]
        name = f"r{self.number()}"
        client = Client(Submission(request_id=name, prompt_token_ids=pack_token_ids(prompt), sampling=spec))
        try:
            self.app.submit(client.submission, client)
        except ServingError:
            return
        self.clients[name] = client

    def tick(self, seconds):
        for process in self.alive():
            process.say(Heartbeat(load=process.load, num_legs=len(process.legs)))
            while process.outbox:
                self.deliver(process)
        self.clock.advance(seconds)
        self.app._tick(self.clock.now_s())

    def kill(self, worker_id):
        """Its last words may be on their way; nobody is told of its end."""
        process = self.workers[worker_id]
        process.is_dead = True
        for _ in range(self.rng.randint(0, len(process.outbox))):
            process.outbox.pop()

    def happen(self):
        rng, choice = self.rng, self.rng.random()
        process = rng.choice(list(self.workers.values()))
        if choice < 0.1:
            self.submit()
        elif choice < 0.4:
            while process.outbox:
                self.deliver(process)
                if rng.random() < 0.5:
                    break
        elif choice < 0.62:
            while process.inbox and not process.is_dead:
                process.hear()
                if rng.random() < 0.5:
                    break
        elif choice < 0.94:
            if not process.is_dead:
                process.step()
        elif choice < 0.95:
            if process.legs and not process.is_dead:
                codes = ["engine_failed", "kv_transfer_failed", "aborted", "invalid_request"]
                process.fail(rng.choice(list(process.legs)), rng.choice(codes))
        elif choice < 0.96:
            if self.clients:
                self.app.abort(rng.choice(list(self.clients)[-20:]))
        elif choice < 0.966:
            self.kill(process.worker_id)
        elif choice < 0.98:
            if process.is_dead:
                self.start(process.worker_id)
        elif choice < 0.982:
            if not process.is_dead:
                process.lose_coordinator()  # a connection broke and stands again
        elif choice < 0.984:
            if not process.is_dead and not process.is_draining:
                process.is_draining = True
                process.say(WorkerLeaving(reason="drain"))
        elif choice < 0.988:
            self.app._look_for_lost()
        else:
            self.tick(rng.choice([0.1, 0.1, 0.5, 4.0]))

    def assert_no_leg_is_forgotten(self):
        """Whoever has heard everything serves nobody but those that are waited for."""
        known = self.core._attempts.legs.keys() | self.core._join_tests._trials.keys()
        for process in self.alive():
            if not process.inbox and self.core.fleet.at(process.peer) is not None:
                assert process.legs.keys() <= known, process.worker_id

    def settle(self):
        """Nothing goes wrong any more: the dead are found and come back, and everybody works."""
        for _ in range(400):
            self.app._look_for_lost()
            for worker_id, process in list(self.workers.items()):
                if process.is_dead:
                    while process.outbox:
                        self.deliver(process)
                    self.start(worker_id)
            for process in self.alive():
                while process.outbox:
                    self.deliver(process)
                while process.inbox and not process.is_dead:
                    process.hear()
                if not process.is_dead:
                    process.step()
            self.tick(0.05)
            if not self.core.num_requests and not any(p.legs or p.inbox or p.outbox for p in self.alive()):
                return

    def assert_nothing_is_left(self):
        core = self.core
        assert core.num_requests == core.num_queued == 0
        for process in self.alive():
            assert not process.legs, (process.worker_id, process.legs)
            assert not process.holds, (process.worker_id, process.holds)
        for worker in core.fleet:
            account = worker.account
            assert (account.num_legs, account.num_queued_tokens, account.num_reserved_blocks) == (0, 0, 0)
            assert account.num_kv_tokens == account.num_waiting == 0
            assert not account._entries and not account._waiting
        assert not core._attempts.legs
        assert not core._join_tests._trials and not +core._join_tests._num_tests
        assert not core.prefixes._computed
        expectations = core._dispatch._router._expectations
        assert expectations is None or not len(expectations)


@pytest.mark.parametrize("seed", range(NUM_SEEDS))
def test_whatever_happens_each_request_ends_once_and_no_worker_is_left_with_a_leg(make_registration, seed):
    rng = random.Random(seed)
    fleet = Fleet(rng, make_registration)
    for worker_id in rng.choice([("p0", "d0"), ("p0", "p1", "d0", "d1"), ("p0", "d0", "b0"), ("b0", "b1")]):
        fleet.start(worker_id)
    for _ in range(1200):
        fleet.happen()
        fleet.assert_no_leg_is_forgotten()
    fleet.settle()
    for name, client in fleet.clients.items():
        assert len(client.reports) == 1, name
    fleet.tick(2.0)
    fleet.settle()
    fleet.assert_nothing_is_left()
    for name, client in fleet.clients.items():
        (report,) = client.reports
        spec = client.submission.sampling
        whole = unbroken(client.submission.prompt_token_ids, spec.max_tokens)
        last = next((n for n, token in enumerate(whole) if token < END_TOKENS), len(whole) - 1)
        expected = whole[: last + 1]
        assert client.token_ids == expected[: len(client.token_ids)], name
        assert report.num_output_tokens == len(client.token_ids)
        if report.outcome is Outcome.COMPLETED:
            assert client.token_ids == expected, name
            assert client.text == "".join("x" if token % 7 else "" for token in expected)
        else:
            assert report.error is not None and report.error.code != "internal_error", report.error
