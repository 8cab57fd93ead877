"""The legs a worker is serving: messages and engine events go in, what to do comes out. No I/O.

A leg is one attempt's work on this worker, named by `handoff_id`. It begins with a start message
and ends with the engine's last word on it, or by being abandoned when the coordinator is lost. Every
message that does not fit is dropped with a reason: a start for a leg that is running (duplicate) or
was over (late), and whatever the engine still says about an abandoned leg.

An abort is always passed on, known leg or not: the engine ignores what it does not know, and it may
still hold a finished prompt's KV that nobody will fetch.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from baton.contract.errors import InvalidRequest, PromptTooLong, ServingError
from baton.contract.lifecycle import WorkerRole
from baton.contract.messages import SequenceDelta, StartDecode, StartPrefill
from baton.contract.tokens import TOKEN_BYTES, num_token_ids

NUM_REMEMBERED = 8_192
"""Ended legs that a late start is still recognised by."""


@dataclass(slots=True)
class Leg:
    handoff_id: str
    request_id: str
    num_prompt_tokens: int
    started_s: float
    num_output_tokens: int = 0
    """Told so far."""


@dataclass(frozen=True, slots=True)
class Start:
    """Hand the message to the engine."""

    leg: Leg


@dataclass(frozen=True, slots=True)
class Refuse:
    """Answer LegFailed; the engine never hears of it."""

    handoff_id: str
    error: ServingError


@dataclass(frozen=True, slots=True)
class Drop:
    """Log one line, do nothing."""

    reason: str


class LegTable:
    def __init__(self, role: WorkerRole, *, max_model_len: int) -> None:
        self._role = role
        self._max_model_len = max_model_len
        self._legs: dict[str, Leg] = {}
        self._ended: OrderedDict[str, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._legs)

    def on_start(self, message: StartPrefill | StartDecode, now_s: float) -> Start | Refuse | Drop:
        handoff_id = message.handoff_id
        if handoff_id in self._legs:
            return Drop("this leg is running: duplicate start")
        if handoff_id in self._ended:
            return Drop("this leg is over: late start")
        error = self._refusal(message)
        if error is not None:
            return Refuse(handoff_id, error)
        leg = Leg(handoff_id, message.request_id, num_token_ids(message.prompt_token_ids), now_s)
        self._legs[handoff_id] = leg
        return Start(leg)

    def on_step(self, deltas: list[SequenceDelta]) -> tuple[list[SequenceDelta], list[tuple[Leg, str]]]:
        """(deltas to report, legs that ended in this step with their finish reason)"""
        known: list[SequenceDelta] = []
        ended: list[tuple[Leg, str]] = []
        for delta in deltas:
            leg = self._legs.get(delta.handoff_id)
            if leg is None:
                continue
            known.append(delta)
            leg.num_output_tokens += len(delta.token_ids)
            if delta.finish_reason is not None:
                ended.append((self._end(delta.handoff_id), delta.finish_reason))
        return known, ended

    def end(self, handoff_id: str) -> Leg | None:
        """The engine's last word on a prefill leg or a failed one; None: nobody waits for it."""
        return self._end(handoff_id) if handoff_id in self._legs else None

    def abandon_all(self) -> list[Leg]:
        """Nobody listens any more: the legs to abort in the engine, whose answers are then dropped."""
        return [self._end(handoff_id) for handoff_id in list(self._legs)]

    def _end(self, handoff_id: str) -> Leg:
        self._ended[handoff_id] = None
        if len(self._ended) > NUM_REMEMBERED:
            self._ended.popitem(last=False)
        return self._legs.pop(handoff_id)

    def _refusal(self, message: StartPrefill | StartDecode) -> ServingError | None:
        phase = WorkerRole.PREFILL if isinstance(message, StartPrefill) else WorkerRole.DECODE
        if phase not in self._role.phases:
            return InvalidRequest(f"a {self._role.value} worker cannot serve {type(message).__name__}")
        num_bytes = len(message.prompt_token_ids)
        if num_bytes % TOKEN_BYTES:
            return InvalidRequest(
                f"prompt_token_ids has {num_bytes} bytes, expected a multiple of {TOKEN_BYTES}",
                param="prompt",
            )
        if num_bytes == 0:
            return InvalidRequest("the prompt is empty", param="prompt")
        num_tokens = num_token_ids(message.prompt_token_ids)
        if num_tokens >= self._max_model_len:
            return PromptTooLong(
                f"prompt has {num_tokens} tokens, this worker accepts {self._max_model_len - 1} "
                "and one of output",
                param="prompt",
            )
        if message.sampling.max_tokens < 1:
            return InvalidRequest(
                f"max_tokens is {message.sampling.max_tokens}, expected at least 1", param="max_tokens"
            )
        if not 0 <= message.num_given_tokens < num_tokens:
            return InvalidRequest(
                f"num_given_tokens is {message.num_given_tokens}, of a prompt of {num_tokens} tokens"
            )
        if isinstance(message, StartDecode) and message.kv_source is not None:
            num_held = message.kv_source.num_tokens
            if not 0 < num_held <= num_tokens:
                return InvalidRequest(f"kv_source holds {num_held} tokens of a prompt of {num_tokens}")
        return None
