"""Every step policy by name, parameters after a colon: `fcfs`, `skip-join-mlfq:8,3.0`."""

from __future__ import annotations

from collections.abc import Callable

from baton.named_spec import parse_named_spec
from baton.scheduling.base import StepPolicy
from baton.scheduling.fcfs import Fcfs
from baton.scheduling.first_iteration import FirstIteration
from baton.scheduling.las import Las
from baton.scheduling.mlfq import BASE_QUANTUM_TOKENS, BOOST_TOKENS, STARVATION_S, Mlfq
from baton.scheduling.shortest_prefill import CHUNK_TOKENS, PER_TOKEN_S, ShortestPrefill
from baton.scheduling.srpt import Srpt


def _fcfs(first_iteration: FirstIteration) -> StepPolicy:
    return Fcfs()


def _mlfq(
    first_iteration: FirstIteration,
    base_quantum_tokens: int = BASE_QUANTUM_TOKENS,
    starvation_s: float = STARVATION_S,
    boost_tokens: int = BOOST_TOKENS,
    *,
    is_skip_join: bool = False,
) -> StepPolicy:
    return Mlfq(
        is_skip_join=is_skip_join,
        base_quantum_tokens=base_quantum_tokens,
        starvation_s=starvation_s,
        boost_tokens=boost_tokens,
        first_iteration=first_iteration,
    )


def _skip_join_mlfq(
    first_iteration: FirstIteration,
    base_quantum_tokens: int = BASE_QUANTUM_TOKENS,
    starvation_s: float = STARVATION_S,
    boost_tokens: int = BOOST_TOKENS,
) -> StepPolicy:
    return _mlfq(first_iteration, base_quantum_tokens, starvation_s, boost_tokens, is_skip_join=True)


_MAKERS: dict[str, tuple[Callable[..., StepPolicy], tuple[type, ...]]] = {
    "fcfs": (_fcfs, ()),
    "mlfq": (_mlfq, (int, float, int)),
    "skip-join-mlfq": (_skip_join_mlfq, (int, float, int)),
    "las": (Las, ()),
    "srpt": (Srpt, ()),
    "shortest-prefill": (ShortestPrefill, (float, int)),
}

NAMES = tuple(_MAKERS)


def by_name(
    spec: str,
    *,
    first_iteration: FirstIteration | None = None,
    chunk_tokens: int | None = None,
    prompt_token_s: float | None = None,
) -> StepPolicy:
    """A new policy object. `first_iteration`: what a prompt costs where prompts are computed beside
    decodes; `chunk_tokens` and `prompt_token_s`: how many prompt tokens a step of a prefill worker takes
    and how long each. Raises ValueError naming the policy, the parameter and what is allowed."""
    name, make, values = parse_named_spec(spec, _MAKERS, noun="scheduler")
    if name == ShortestPrefill.name:
        return ShortestPrefill(
            *values,
            chunk_tokens=chunk_tokens or CHUNK_TOKENS,
            per_token_s=prompt_token_s or PER_TOKEN_S,
        )
    return make(first_iteration or FirstIteration(), *values)
