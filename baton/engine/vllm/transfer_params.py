"""What a vLLM request tells Baton's connector of its hand-off, and what it is told of held KV.

The connector's keys are strings here because its module loads nixl, which only the engine's child processes
need; a test compares them.
"""

from __future__ import annotations

from typing import Any

from baton.contract.messages import KvSource, StartDecode, StartPrefill
from baton.transfer.lease import ReadWindow, time_left_s

HOLD_UNLESS_STOPPED = "baton_hold_unless_stopped"
LEASE_END_S = "baton_lease_end_s"
NUM_STAGES = "baton_num_stages"
RELEASE_HELD = "baton_release_held"
STREAM_ID = "baton_stream_id"
STREAM_LEASE_S = "baton_stream_lease_s"
STREAM_FIRST_TOKEN = "baton_stream_first_token"


def to_hold(message: StartPrefill, *, can_stream: bool) -> dict[str, Any] | None:
    """Of a prefill leg. None: nobody wants its KV."""
    if not message.keep_kv:
        return None
    params = {"do_remote_decode": True, "do_remote_prefill": False, HOLD_UNLESS_STOPPED: True}
    return params | {STREAM_ID: message.handoff_id} if can_stream else params


def to_read(
    message: StartDecode, *, now_s: float, margin_s: float, pull_timeout_s: float
) -> dict[str, Any] | None:
    """Of a decode leg. None: it computes its prompt."""
    source = message.kv_source
    if source is None:
        return None
    window = ReadWindow.opened(
        now_s=now_s, lease_s=source.lease_s, margin_s=margin_s, pull_timeout_s=pull_timeout_s
    )
    params = {**source.transfer_params, LEASE_END_S: window.lease_end_s}
    if source.is_streamed:
        params |= {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_num_tokens": source.num_tokens,
            STREAM_ID: message.handoff_id,
            STREAM_LEASE_S: source.lease_s,
            STREAM_FIRST_TOKEN: source.has_first_token,
        }
    return params


def is_held(params: dict[str, Any] | None) -> bool:
    """What a finished prefill leg was told: its KV stays for a reader."""
    return params is not None and params.get(LEASE_END_S) is not None


def held_source(params: dict[str, Any], *, now_s: float, kv_bytes_per_block: int) -> tuple[KvSource, float]:
    """Where a decode worker finds that KV, and when its lease ends."""
    lease_end_s: float = params[LEASE_END_S]
    source = KvSource(
        lease_s=time_left_s(lease_end_s=lease_end_s, now_s=now_s),
        num_tokens=params["remote_num_tokens"],
        num_bytes=len(params["remote_block_ids"][0]) * kv_bytes_per_block,
        transfer_params={key: value for key, value in params.items() if key != LEASE_END_S},
    )
    return source, lease_end_s
