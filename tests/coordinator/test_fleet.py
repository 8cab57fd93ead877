"""Who may join."""

from __future__ import annotations

import pytest

from baton.contract.errors import ProtocolMismatch, RegistrationRefused, WorkerIdTaken
from baton.contract.lifecycle import WorkerRole

P, D = WorkerRole.PREFILL, WorkerRole.DECODE


def test_another_protocol_is_refused(bench, make_registration):
    with pytest.raises(ProtocolMismatch, match="speaks protocol 99"):
        bench.core.fleet.check(make_registration("d1", D, protocol_version=99), b"d1")


def test_a_forged_worker_id_is_refused_while_its_owner_lives(bench, make_registration):
    forged = make_registration("p0", P, boot_id="other")
    with pytest.raises(WorkerIdTaken, match="p0 is in use by process 1"):
        bench.core.fleet.check(forged, b"stranger")
    bench.perform(bench.core.worker_lost("p0", "silent", 1.0))
    bench.core.fleet.check(forged, b"stranger")


def test_one_connection_is_one_worker(bench, make_registration):
    with pytest.raises(RegistrationRefused, match="already registered as p0, not p7"):
        bench.core.fleet.check(make_registration("p7", P), b"p0")


def test_the_same_process_may_register_again_on_a_new_connection(bench, make_registration):
    bench.core.fleet.check(make_registration("p0", P), b"reconnected")


def test_nonsense_capacity_is_refused(bench, make_registration):
    with pytest.raises(RegistrationRefused, match=r"capacity\.num_blocks is 0"):
        bench.core.fleet.check(make_registration("d1", D, num_blocks=0), b"d1")


def test_the_last_worker_to_leave_takes_the_layout_along(bench):
    bench.core.fleet.remove("p0")
    bench.core.fleet.remove("d0")
    assert bench.core.fleet.layout is None
    bench.add("p9", P, dtype="bfloat16")
    layout = bench.core.fleet.layout
    assert layout is not None and layout.dtype == "bfloat16"
