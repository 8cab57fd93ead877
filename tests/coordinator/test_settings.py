from __future__ import annotations

import pytest

from baton.settings import SettingsError
from coordinator.settings import CoordinatorSettings


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"http_port": 99_999}, "http_port is 99999, expected 0 to 65535"),
        ({"fleet_port": -1}, "fleet_port is -1, expected 0 to 65535"),
        ({"max_queued": 0}, "max_queued is 0, expected at least 1"),
        ({"max_attempts": 0}, "max_attempts is 0, expected at least 1"),
        ({"queue_timeout_s": -5.0}, "queue_timeout_s is -5, expected more than 0"),
        ({"heartbeat_interval_s": 0.0}, "heartbeat_interval_s is 0, expected more than 0"),
        ({"heartbeat_timeout_s": float("nan")}, "heartbeat_timeout_s is nan, expected more than 0"),
        ({"drain_timeout_s": -1.0}, "drain_timeout_s is -1, expected at least 0"),
        ({"kv_index_gib": 0.0}, "kv_index_gib is 0, expected more than 0"),
    ],
)
def test_values_nobody_can_mean_are_refused_by_name(changes: dict[str, object], sentence: str):
    with pytest.raises(SettingsError, match=sentence):
        CoordinatorSettings(**changes)  # type: ignore[arg-type]
