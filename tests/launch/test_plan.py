from __future__ import annotations

import itertools
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from baton.launch.plan import (
    Ports,
    PortTaken,
    ServeSettings,
    choose_ports,
    plan_coordinator,
    plan_workers,
    reachable_host,
)
from baton.ports import free_port
from baton.settings import SettingsError

PORTS = Ports(http=8000, fleet=5570, client=5571)


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def flags(command: list[str]) -> dict[str, str]:
    return {flag: value for flag, value in itertools.pairwise(command) if flag.startswith("--")}


def test_a_named_port_that_is_taken_is_an_error_that_names_the_flag(taken_port: int):
    with pytest.raises(PortTaken, match=f"port {taken_port} on 127.0.0.1 is taken .*--http-port"):
        choose_ports(ServeSettings(http_port=taken_port))


def test_ports_not_named_are_free_and_differ():
    named = free_port()
    ports = choose_ports(ServeSettings(fleet_port=named))
    assert ports.fleet == named
    assert len({ports.http, ports.fleet, ports.client}) == 3


def test_a_default_port_that_is_taken_gives_way_to_the_next(monkeypatch: pytest.MonkeyPatch, taken_port: int):
    monkeypatch.setattr("baton.launch.plan.DEFAULT_HTTP_PORT", taken_port)
    assert choose_ports(ServeSettings()).http > taken_port


def test_workers_get_names_and_the_coordinator():
    plans = plan_workers(ServeSettings(num_prefill=2, num_decode=1), PORTS, "/models/m")
    assert [plan.name for plan in plans] == ["prefill-1", "prefill-2", "decode-1"]
    given = flags(plans[2].command)
    assert given["--coordinator"] == "127.0.0.1:5570"
    assert given["--worker-id"] == "decode-1"
    assert given["--model"] == "/models/m"
    assert "decode" in plans[2].command


def test_workers_for_both_phases_come_last_and_alone_if_asked(tmp_path: Path):
    config = tmp_path / "both.yaml"
    config.write_text("max_batch_size: 8\n")
    settings = ServeSettings(device="cuda", num_both=1, both_config=str(config))
    plans = plan_workers(settings, PORTS, "m")
    assert [plan.name for plan in plans] == ["prefill-1", "decode-1", "both-1"]
    assert [plan.env["CUDA_VISIBLE_DEVICES"] for plan in plans] == ["0", "1", "2"]
    assert "both" in plans[2].command and flags(plans[2].command)["--config"] == str(config)
    alone = ServeSettings(num_prefill=0, num_decode=0, num_both=2)
    assert [plan.name for plan in plan_workers(alone, PORTS, "m")] == ["both-1", "both-2"]


def test_every_child_dies_with_the_launcher():
    settings = ServeSettings()
    plans = [plan_coordinator(settings, PORTS, "m"), *plan_workers(settings, PORTS, "m")]
    assert all("--exit-with-parent" in plan.command for plan in plans)


def test_an_unchanged_setting_does_not_hide_a_roles_yaml_file(tmp_path: Path):
    config = tmp_path / "prefill.yaml"
    config.write_text("dtype: bfloat16\n")
    prefill, decode = plan_workers(ServeSettings(prefill_config=str(config)), PORTS, "m")
    assert flags(prefill.command)["--config"] == str(config)
    assert "--dtype" not in prefill.command
    assert "--config" not in decode.command


def test_changed_settings_reach_the_workers():
    settings = ServeSettings(dtype="bfloat16", max_model_len=1024, kv_cache_gib=0.5, tensor_parallel_size=2)
    given = flags(plan_workers(settings, PORTS, "m")[0].command)
    assert given["--dtype"] == "bfloat16"
    assert given["--max-model-len"] == "1024"
    assert given["--kv-cache-gib"] == "0.5"
    assert given["--tensor-parallel-size"] == "2"


def test_gpus_are_dealt_to_prefill_workers_first():
    settings = ServeSettings(device="cuda", num_decode=2, tensor_parallel_size=2, devices="2-7")
    plans = plan_workers(settings, PORTS, "m")
    assert [plan.env["CUDA_VISIBLE_DEVICES"] for plan in plans] == ["2,3", "4,5", "6,7"]


def test_gpus_are_counted_from_zero_when_not_named():
    plans = plan_workers(ServeSettings(device="cuda"), PORTS, "m")
    assert [plan.env["CUDA_VISIBLE_DEVICES"] for plan in plans] == ["0", "1"]


def test_a_simulated_fleet_loads_no_tokenizer():
    settings = ServeSettings(engine="simulated")
    assert flags(plan_coordinator(settings, PORTS, None).command)["--tokenizer"] == "none"


def test_a_coordinator_on_all_addresses_is_called_on_loopback():
    settings = ServeSettings(host="0.0.0.0")
    assert flags(plan_coordinator(settings, PORTS, "m").command)["--host"] == "0.0.0.0"
    assert flags(plan_workers(settings, PORTS, "m")[0].command)["--coordinator"] == "127.0.0.1:5570"
    assert reachable_host("::") == "::1"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_prefill": 0}, "num_prefill is 0, expected at least 1"),
        ({"num_decode": 0}, "num_decode is 0, expected at least 1"),
        ({"num_both": -1}, "num_both is -1, expected at least 0"),
        ({"http_port": 70_000}, "http_port is 70000, expected 1 to 65535"),
        ({"devices": "0-1"}, "devices names GPUs, and device is cpu"),
        ({"device": "cuda", "devices": "0"}, "names 1, 2 workers of 1 ranks need 2"),
        ({"prefill_config": "absent.yaml"}, "prefill_config: there is no file absent.yaml"),
        ({"model": "/no/such/folder"}, "model: there is no folder /no/such/folder"),
    ],
)
def test_bad_settings_are_refused_by_name(changes: dict[str, object], sentence: str):
    with pytest.raises(SettingsError, match=sentence):
        ServeSettings(**changes)  # type: ignore[arg-type]
