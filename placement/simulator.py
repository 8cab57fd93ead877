"""One fleet, one workload, one rate: when each request got its tokens.

Thin: checks what a fleet can hold at all, calls the compiled kernels, and names their columns.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from placement.kernels.colocated import simulate_colocated
from placement.kernels.split import simulate_split
from placement.requests import Requests
from placement.step_table import MixedTable, StepTable

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

UNLIMITED = 2**60
"""Tokens: of KV memory, or of a prefill window."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Links:
    """How KV gets from prefill worker p to decode worker d: inside a node (kind 0, links of their own) or
    over the network (kind 1, one link per node and direction, shared by its workers)."""

    kind: Ints
    """[p, d], 0 or 1."""
    source_node: Ints
    target_node: Ints
    base_s: Floats
    """By kind: latency of one transfer."""
    token_s: Floats
    """By kind: seconds per prompt token."""

    @classmethod
    def free(cls, num_prefill: int, num_decode: int) -> Links:
        """Transfers take no time."""
        return cls.inside_one_node(num_prefill, num_decode, token_s=0.0)

    @classmethod
    def inside_one_node(
        cls, num_prefill: int, num_decode: int, *, token_s: float, base_s: float = 0.0
    ) -> Links:
        return cls(
            kind=np.zeros((num_prefill, num_decode), np.int64),
            source_node=np.zeros(num_prefill, np.int64),
            target_node=np.zeros(num_decode, np.int64),
            base_s=np.array([base_s, base_s]),
            token_s=np.array([token_s, token_s]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitFleet:
    prefill: StepTable
    num_prefill: int
    decode: StepTable
    num_decode: int
    links: Links
    prefill_kv_tokens: int = UNLIMITED
    """Per worker, all its ranks together."""
    decode_kv_tokens: int = UNLIMITED
    batch_tokens: int = 2048
    """Prompts are batched up to so many tokens (DistServe's L_m); a longer one is computed alone."""
    window_tokens: int = UNLIMITED
    """As the coordinator's `prefill_window_tokens`; without a limit a prompt is dispatched on arrival."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ColocatedFleet:
    table: StepTable
    num_workers: int
    kv_tokens: int = UNLIMITED
    batch_tokens: int = 2048
    """Of prompts in one prefill step; the whole step's budget when chunked."""
    mixed: MixedTable | None = None
    """Present: prompts are computed in chunks beside decodes."""


Fleet = SplitFleet | ColocatedFleet


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds per request. A request that fits no worker has infinite ones."""

    ttft_s: Floats
    tpot_s: Floats
    """(last − first token) / (n − 1): waiting for the decode worker counts, the first token does not."""
    parts_s: dict[str, Floats] = field(default_factory=dict)
    """Where the time went; see `simulate`."""
    busy_share: dict[str, float] = field(default_factory=dict)
    """By phase: the share of the run in which a worker was computing."""


def fits(fleet: Fleet, requests: Requests) -> npt.NDArray[np.bool_]:
    """Which requests the fleet can hold alone."""
    total = requests.num_prompt_tokens + requests.num_output_tokens
    if isinstance(fleet, ColocatedFleet):
        return total <= fleet.kv_tokens
    return (requests.num_prompt_tokens <= fleet.prefill_kv_tokens) & (total <= fleet.decode_kv_tokens)


@dataclass(frozen=True, slots=True)
class StopEarly:
    """A trial is over once so many requests missed a limit that the SLO cannot be kept any more."""

    ttft_limit_s: float
    tpot_limit_s: float
    first_counted: int
    end_counted: int
    max_failures: int


def simulate(
    fleet: Fleet,
    requests: Requests,
    rate_per_s: float,
    *,
    with_parts: bool = False,
    stop: StopEarly | None = None,
) -> Timings:
    """With `stop`, requests that had not ended by then have infinite times.

    `parts_s` of a split fleet: queue, prefill, room (for KV on the decode side), link; of a colocated
    one: queue, prefill. What is left of a request's life is decode."""
    can = fits(fleet, requests)
    if can.all():
        return _simulate(fleet, requests, rate_per_s, with_parts, stop)
    ttft_s, tpot_s = np.full(len(requests), np.inf), np.full(len(requests), np.inf)
    if can.sum() > 1:
        done = _simulate(fleet, requests.only(can), rate_per_s, False, stop)
        ttft_s[can], tpot_s[can] = done.ttft_s, done.tpot_s
        return Timings(ttft_s, tpot_s, {}, done.busy_share)
    return Timings(ttft_s, tpot_s)


def _simulate(
    fleet: Fleet, requests: Requests, rate_per_s: float, with_parts: bool, stop: StopEarly | None
) -> Timings:
    arrival = requests.arrival / rate_per_s
    prompt, cached, output = (
        requests.num_prompt_tokens, requests.num_cached_tokens, requests.num_output_tokens,
    )  # fmt: skip
    limits = (np.inf, np.inf, 0, len(requests), len(requests))
    if stop is not None:
        limits = (
            stop.ttft_limit_s, stop.tpot_limit_s, stop.first_counted, stop.end_counted, stop.max_failures,
        )  # fmt: skip
    if isinstance(fleet, ColocatedFleet):
        mixed = fleet.mixed
        grid, terms = (mixed.tokens, mixed.terms) if mixed else (np.array([1.0, 2.0]), np.zeros((3, 2, 2)))
        times, busy = simulate_colocated(
            arrival, prompt, cached, output, requests.draw,
            fleet.num_workers, fleet.kv_tokens, fleet.table.max_batch, fleet.batch_tokens, mixed is not None,
            fleet.table.prefill, fleet.table.alpha, fleet.table.beta,
            grid, mixed.batch if mixed else np.array([0.0, 1.0]), terms, *limits,
        )  # fmt: skip
        started, first, ended = times
        parts = {"queue": started - arrival, "prefill": first - started} if with_parts else {}
        share = {"colocated": float(busy.mean()) / _span_s(arrival, ended)}
    else:
        links = fleet.links
        times, busy = simulate_split(
            arrival, prompt, cached, output, requests.draw,
            fleet.prefill.prefill, fleet.num_prefill, fleet.prefill_kv_tokens, fleet.batch_tokens,
            fleet.window_tokens,
            fleet.decode.alpha, fleet.decode.beta, fleet.num_decode, fleet.decode_kv_tokens,
            fleet.decode.max_batch,
            links.kind, links.source_node, links.target_node, links.base_s, links.token_s,
            *limits,
        )  # fmt: skip
        started, first, assigned, landed, ended = times
        parts = {}
        if with_parts:
            parts = {
                "queue": started - arrival, "prefill": first - started,
                "room": assigned - first, "link": landed - assigned,
            }  # fmt: skip
        share = {
            "prefill": float(busy[: fleet.num_prefill].mean()) / _span_s(arrival, first),
            "decode": float(busy[fleet.num_prefill :].mean()) / _span_s(arrival, ended),
        }
    with np.errstate(invalid="ignore"):  # never started: inf - inf is no time that keeps a limit
        tpot_s = (ended - first) / np.maximum(1, output - 1)
    return Timings(first - arrival, tpot_s, parts, share)


def _span_s(arrival: Floats, ended: Floats) -> float:
    last = ended[np.isfinite(ended)]
    return max(1e-9, float(last.max() - arrival[0])) if len(last) else float("inf")
