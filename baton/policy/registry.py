"""Every policy by name, parameters after a colon: `lmetric`, `linear:0.7`, `slo:1.0,0.02`.

Any policy can serve either phase: prefill ranks the whole pool, decode those with room.
"""

from __future__ import annotations

from collections.abc import Callable

from baton.named_spec import parse_named_spec
from baton.policy.aibrix_filter import AibrixFilter
from baton.policy.base import Policy
from baton.policy.cache_aware import CacheAware
from baton.policy.dynamo_cost import DynamoCost
from baton.policy.fewest_kv_tokens import FewestKvTokens
from baton.policy.least_request import LeastRequest
from baton.policy.linear import Linear
from baton.policy.lmetric import LMetric
from baton.policy.p_token import PToken
from baton.policy.power_of_two import PowerOfTwo
from baton.policy.preble import Preble
from baton.policy.random_choice import RandomChoice
from baton.policy.round_robin import RoundRobin
from baton.policy.slo import SloRule
from baton.policy.smallest_batch import SmallestBatch
from baton.policy.vllm_v1 import VllmV1

DEFAULT_PREFILL = "lmetric"
DEFAULT_DECODE = "smallest-batch"

_MAKERS: dict[str, tuple[Callable[..., Policy], tuple[type, ...]]] = {
    "lmetric": (LMetric, ()),
    "p-token": (PToken, ()),
    "vllm": (VllmV1, (int,)),
    "linear": (Linear, (float,)),
    "filter": (AibrixFilter, (int,)),
    "cache-aware": (CacheAware, (float, int, float)),
    "dynamo": (DynamoCost, (float, float, float)),
    "preble": (Preble, (float,)),
    "slo": (SloRule, (float, float)),
    "least-request": (LeastRequest, ()),
    "round-robin": (RoundRobin, ()),
    "random": (RandomChoice, ()),
    "power-of-two": (PowerOfTwo, ()),
    "smallest-batch": (SmallestBatch, ()),
    "fewest-kv-tokens": (FewestKvTokens, ()),
}

NAMES = tuple(_MAKERS)


def by_name(spec: str) -> Policy:
    """A new policy object. Raises ValueError naming the policy, the parameter and what is allowed."""
    _, make, values = parse_named_spec(spec, _MAKERS, noun="policy")
    return make(*values)
