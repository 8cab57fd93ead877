"""The measuring itself: every point once per round, in an order that changes, until the time is up.

A drift of the machine then falls on all points alike. The median of the rounds counts: a fleet has to live
with the machine's slow moments as well as with its quick ones, and not with a spike.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

from baton.engine.base import EngineDescription
from baton.profiling.grid import HEADROOM_TOKENS, NUM_STEPS, Grid
from baton.profiling.probe import Probe
from baton.step_time import prefill_pairs
from baton.step_time.profile import MeasuredStep, MeasuredTransfer

MAX_ROUNDS = 5


@dataclass(slots=True)
class Measured:
    prompts: dict[int, list[float]] = field(default_factory=dict)
    decodes: dict[tuple[int, int], list[tuple[float, int]]] = field(default_factory=dict)
    """Seconds and context tokens."""
    transfers: dict[int, list[float]] = field(default_factory=dict)
    """From order to first token, by prompt tokens."""
    overheads_s: list[float] = field(default_factory=list)
    num_rounds: int = 0
    left_out: list[str] = field(default_factory=list)
    """Points that the time did not suffice for, in words."""

    def steps(self) -> list[MeasuredStep]:
        found = [
            MeasuredStep(
                num_prefill_tokens=tokens,
                num_prefill_pairs=prefill_pairs(tokens),
                seconds=median(values),
                repeats_s=values,
            )
            for tokens, values in sorted(self.prompts.items())
        ]
        for (batch, _), visits in sorted(self.decodes.items()):
            values = [seconds for seconds, _ in visits]
            found.append(
                MeasuredStep(
                    num_decodes=batch,
                    num_context_tokens=round(median(context for _, context in visits)),
                    seconds=median(values),
                    repeats_s=values,
                )
            )
        return found

    def moved(self, kv_bytes_per_token: float, step_s: Callable[[int], float]) -> list[MeasuredTransfer]:
        """`step_s(tokens)`: the step that makes the first token after so much context."""
        found = []
        for tokens, values in sorted(self.transfers.items()):
            without_step = [max(0.0, value - step_s(tokens)) for value in values]
            found.append(
                MeasuredTransfer(
                    kv_bytes=round(tokens * kv_bytes_per_token),
                    seconds=median(without_step),
                    repeats_s=without_step,
                )
            )
        return found


async def measure(
    prefill: Probe,
    decode: Probe,
    points: Grid,
    description: EngineDescription,
    *,
    budget_s: float,
    say: Callable[[str], None],
) -> Measured:
    """At least one visit to each point that is reached; `budget_s` from now. Raises MeasuringFailed."""
    measured = Measured()
    order = random.Random(1)
    deadline_s = time.perf_counter() + budget_s
    await prefill.prefill(prefill.prompt(64))  # kernels of the first forward are loaded here
    await _move(prefill, decode, 64)  # the two engines shake hands on the first one
    for number in range(1, MAX_ROUNDS + 1):
        round_started_s = time.perf_counter()
        visits: list[tuple[str, int, int]] = [("prompt", tokens, 0) for tokens in points.prompts]
        visits += [("transfer", tokens, 0) for tokens in points.transfers]
        visits += [("decode", batch, context) for batch, context in points.decodes]
        if number > 1:  # the first round goes from cheap to costly: what the time cuts off is costly
            order.shuffle(visits)
        for kind, first, second in visits:
            if time.perf_counter() > deadline_s:
                if number == 1:
                    measured.left_out.append(f"{kind} {first}" + (f" x {second}" if second else ""))
                continue
            await _visit(measured, prefill, decode, description, kind, first, second)
        measured.num_rounds = number
        took_s = time.perf_counter() - round_started_s
        say(f"round {number}: {len(visits)} points in {took_s:.1f} s")
        if time.perf_counter() + took_s > deadline_s:
            break
    return measured


async def _visit(
    measured: Measured, prefill: Probe, decode: Probe, description: EngineDescription, kind: str, first: int,
    second: int,
) -> None:  # fmt: skip
    if kind == "prompt":
        done = await prefill.prefill(prefill.prompt(first))
        measured.prompts.setdefault(first, []).append(done.step_s)
        measured.overheads_s.append(max(0.0, done.wall_s - done.step_s))
    elif kind == "decode":
        room = description.capacity.max_model_len - second - 1
        kv_room = description.capacity.num_blocks * description.layout.block_size_tokens // first - second
        step = await decode.decode_batch(
            first, second, num_steps=NUM_STEPS, max_tokens=max(HEADROOM_TOKENS, min(room, kv_room))
        )
        measured.decodes.setdefault((first, second), []).append((step.seconds, step.num_context_tokens))
    else:
        measured.transfers.setdefault(first, []).append(await _move(prefill, decode, first))


async def _move(prefill: Probe, decode: Probe, num_tokens: int) -> float:
    prompt = prefill.prompt(num_tokens)
    done = await prefill.prefill(prompt, keep_kv=True)
    source = done.finished.kv_source
    first_token = done.finished.delta.token_ids
    return await decode.first_token_s([*prompt, *first_token], source)
