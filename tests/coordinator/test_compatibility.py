"""users' pain 11: workers that cannot pass each other KV never meet, and the 503 says why."""

from __future__ import annotations

import pytest

from baton.contract.errors import NoWorkers, RegistrationRefused
from baton.contract.lifecycle import WorkerRole

P, D, BOTH = WorkerRole.PREFILL, WorkerRole.DECODE, WorkerRole.BOTH

KNOWN = {"attention_backend": "FLASH_ATTN", "weights": "0123abcd"}

DIFFERENCES = [
    ("model", "other"), ("engine", "simulated 2"), ("transfer", "nixl 9"), ("dtype", "bfloat16"),
    ("num_layers", 3), ("num_kv_heads", 4), ("head_dim", 16), ("block_size_tokens", 32),
    ("cache_dtype", "fp8"), ("attention_backend", "FLASHINFER"), ("weights", "ffff"),
    ("pipeline_parallel_size", 2), ("tensor_parallel_size", 3),
]  # fmt: skip
"""Of a prefill worker with tensor parallel size 2."""


@pytest.fixture
def half(make_bench):
    """A prefill worker that knows all there is to know about itself, and nobody to decode."""
    bench = make_bench()
    bench.add("p0", P, tensor_parallel_size=2, **KNOWN)
    return bench


def join(bench, message):
    """As the app does it."""
    try:
        bench.core.fleet.check(message, message.worker_id.encode())
    except RegistrationRefused as error:
        bench.core.fleet.refused(message, error.message)
        raise
    bench.perform(bench.core.worker_registered(message, message.worker_id.encode(), bench.now_s))


@pytest.mark.parametrize(("field", "value"), DIFFERENCES, ids=[field for field, _ in DIFFERENCES])
def test_each_field_that_differs_is_named_with_both_values(half, make_registration, field, value):
    """
    1. a decode worker differs in one field: refused, with the field and both values
    2. a request hears the same sentence, and so does /ready
    3. one that fits joins: the fleet serves, and the refusal is forgotten
    """
    fields = {"tensor_parallel_size": 2, **KNOWN}
    registered = half.worker("p0").registration
    here = getattr(registered, field, None) or getattr(registered.layout, field, None)
    sentence = f"worker d0 cannot join: {field} is {value!r}, this fleet has {here!r}"
    with pytest.raises(RegistrationRefused, match=sentence):
        join(half, make_registration("d0", D, **fields | {field: value}))
    with pytest.raises(NoWorkers, match=f"no decode worker is ready; {sentence}"):
        half.submit("r")
    assert sentence in half.core.facts().why_not_ready

    join(half, make_registration("d1", D, **fields))
    assert half.core.facts().is_ready and half.core.facts().why_not_ready is None
    half.submit("r")
    half.perform(half.core.worker_lost("d1", "killed", 1.0))
    assert half.core.facts().why_not_ready == "no decode worker is ready"


@pytest.mark.parametrize("field", KNOWN, ids=str)
def test_what_a_worker_does_not_know_is_not_compared(half, make_registration, field):
    join(half, make_registration("d0", D, tensor_parallel_size=2, **KNOWN | {field: None}))
    assert half.core.facts().is_ready


@pytest.mark.parametrize(
    ("role", "size", "is_welcome"),
    [(D, 1, True), (D, 4, True), (D, 3, False), (P, 3, True), (BOTH, 3, False), (BOTH, 1, True)],
    ids=["half", "twice", "no divisor", "same phase never meets", "both meet everybody", "both, half"],
)
def test_tensor_parallel_sizes_of_workers_that_meet_must_divide(
    half, make_registration, role, size, is_welcome
):
    message = make_registration("w", role, tensor_parallel_size=size, **KNOWN)
    if is_welcome:
        join(half, message)
    else:
        with pytest.raises(RegistrationRefused, match="neither divides the other"):
            join(half, message)


def test_a_worker_may_come_back_as_something_else_when_it_is_alone(half, make_registration):
    join(half, make_registration("p0", P, dtype="bfloat16"))
    with pytest.raises(RegistrationRefused, match="dtype is 'float32', this fleet has 'bfloat16'"):
        join(half, make_registration("d0", D))


def test_refusals_are_bounded(half, make_registration):
    for number in range(100):
        with pytest.raises(RegistrationRefused):
            join(half, make_registration(f"d{number}", D, dtype="float16"))
    assert half.core.facts().why_not_ready.count("cannot join") == 8
