"""Settings to engines: which of them offer streams."""

from __future__ import annotations

from typing import Any

import pytest

from baton.contract.lifecycle import WorkerRole
from baton.engine.simulated.engine import SimulatedEngine
from baton.worker.engines import build_engine
from baton.worker.settings import WorkerSettings


@pytest.mark.parametrize(
    ("role", "told", "is_streaming"),
    [
        (WorkerRole.PREFILL, {}, True),
        (WorkerRole.DECODE, {}, True),
        (WorkerRole.PREFILL, {"transfer": "pull"}, False),
        (WorkerRole.DECODE, {"transfer": "pull"}, False),
        (WorkerRole.BOTH, {}, False),  # as with vLLM: it has one half of a stream
    ],
)
def test_workers_stream_unless_told_otherwise(
    role: WorkerRole, told: dict[str, Any], is_streaming: bool
) -> None:
    engine = build_engine(WorkerSettings(engine="simulated", **told), role)
    assert isinstance(engine, SimulatedEngine)
    assert engine.settings.is_streaming is is_streaming
