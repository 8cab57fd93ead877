"""What is remembered of KV that waits for its reader."""

from __future__ import annotations

from baton.engine.vllm.held_kv import HeldKv


def test_held_kv_can_be_given_back_once_until_its_lease_is_long_over() -> None:
    """
    1. two prefill legs leave KV under leases of 10 s; one is given back, and no second time
    2. a third one ends after the other's lease and what readers may have added to it: that one is forgotten
    """
    held = HeldKv(kv_lease_s=10.0)
    held.keep("h1", "v1", lease_end_s=10.0, now_s=0.0)
    held.keep("h2", "v2", lease_end_s=11.0, now_s=1.0)
    assert (held.take("h1"), held.take("h1")) == ("v1", None)
    held.keep("h3", "v3", lease_end_s=41.0, now_s=31.0)  # 11 + 2 * 10
    assert (held.take("h2"), held.take("h3")) == (None, "v3")
