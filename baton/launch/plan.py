"""What `baton serve` will start: settings in, command lines out. Starts nothing itself.

The launcher's own settings are those that most people change. Everything else of a role goes into
a YAML file for that role (`--prefill-config` and so on); flags win over it.
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from baton.launch.devices import split_devices
from baton.ports import is_port_free
from baton.settings import SettingsError, option
from baton.wire.endpoints import (
    DEFAULT_CLIENT_PORT,
    DEFAULT_FLEET_PORT,
    DEFAULT_HOST,
    DEFAULT_HTTP_PORT,
)

NUM_PORTS_TRIED = 100

SHARED_WITH_WORKERS = (
    "engine", "device", "dtype", "tensor_parallel_size", "pipeline_parallel_size", "max_model_len",
    "kv_cache_gib", "drain_timeout_s",
)  # fmt: skip
"""Settings that workers have under the same name, with the same default."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeSettings:
    model: str | None = option(
        None, "model folder or hub name; absent: a tiny demo model is made, which answers but talks no sense"
    )
    num_prefill: int = option(1, "prefill workers")
    num_decode: int = option(1, "decode workers")
    num_both: int = option(0, "workers for both phases; with some, the other two numbers may be 0")
    host: str = option(DEFAULT_HOST, "address to listen on; loopback unless told, since nothing is encrypted")
    http_port: int | None = option(
        None, f"port of the HTTP door; absent: {DEFAULT_HTTP_PORT}, or the next free one"
    )
    fleet_port: int | None = option(
        None, f"port workers connect to; absent: {DEFAULT_FLEET_PORT}, or the next free one"
    )
    client_port: int | None = option(
        None, f"port of the ZeroMQ door; absent: {DEFAULT_CLIENT_PORT}, or the next free one"
    )
    device: Literal["cpu", "cuda"] = option("cpu", "what the engines compute on")
    devices: str | None = option(
        None,
        "GPUs, dealt out to prefill workers first, those for both phases last: `0-3`, or `0,1;2,3` worker by "
        "worker; absent: 0, 1, …",
    )
    engine: Literal["vllm", "simulated"] = option("vllm", "`simulated` computes no model: for tests and load")
    dtype: str = option("auto", "of weights and KV; `auto` takes the model's own")
    tensor_parallel_size: int = option(1, "ranks that share each layer, per worker")
    pipeline_parallel_size: int = option(1, "ranks that take layers in turn, per worker")
    max_model_len: int | None = option(None, "longest prompt + output in tokens; absent: the model's")
    kv_cache_gib: float | None = option(None, "memory for KV per rank; absent: the worker's default")
    coordinator_config: str | None = option(None, "YAML file for the coordinator", metavar="FILE")
    prefill_config: str | None = option(None, "YAML file for prefill workers", metavar="FILE")
    decode_config: str | None = option(None, "YAML file for decode workers", metavar="FILE")
    both_config: str | None = option(None, "YAML file for workers for both phases", metavar="FILE")
    start_timeout_s: float = option(600.0, "longest wait until all workers are ready, seconds")
    drain_timeout_s: float = option(30.0, "how long running requests may finish after Ctrl-C, seconds")
    run_dir: str = option(".run/serve", "where logs and process records go")
    demo_model: str = option(".models/demo", "where the demo model is made")
    self_test: bool = option(True, "send one request at start and check that its KV really moved")

    def __post_init__(self) -> None:
        each_phase = 0 if self.num_both > 0 else 1
        for name, least in (("num_prefill", each_phase), ("num_decode", each_phase), ("num_both", 0),
                            ("tensor_parallel_size", 1), ("pipeline_parallel_size", 1)):  # fmt: skip
            if getattr(self, name) < least:
                raise SettingsError(f"{name} is {getattr(self, name)}, expected at least {least}")
        for name in ("http_port", "fleet_port", "client_port"):
            port = getattr(self, name)
            if port is not None and not 0 < port < 65_536:
                raise SettingsError(f"{name} is {port}, expected 1 to 65535")
        is_path = self.model is not None and self.model.startswith(("/", ".", "~"))  # no hub name does
        if self.engine == "vllm" and is_path and not Path(str(self.model)).is_dir():
            raise SettingsError(f"model: there is no folder {self.model}")
        for name in ("coordinator_config", "prefill_config", "decode_config", "both_config"):
            path = getattr(self, name)
            if path is not None and not Path(path).is_file():
                raise SettingsError(f"{name}: there is no file {path}")
        if self.devices is not None and self.device == "cpu":
            raise SettingsError("devices names GPUs, and device is cpu")
        try:
            self.device_groups()
        except ValueError as error:
            raise SettingsError(str(error)) from error

    def device_groups(self) -> list[str | None]:
        """CUDA_VISIBLE_DEVICES of each worker, as `plan_workers` orders them; all None on a CPU."""
        num_workers = self.num_prefill + self.num_decode + self.num_both
        if self.device == "cpu":
            return [None] * num_workers
        ranks = self.tensor_parallel_size * self.pipeline_parallel_size
        spec = self.devices or f"0-{num_workers * ranks - 1}"
        return list(split_devices(spec, num_workers, ranks))


@dataclass(frozen=True, slots=True, kw_only=True)
class Ports:
    http: int
    fleet: int
    client: int


class PortTaken(Exception):
    """A sentence: which port, and what to do."""


def choose_ports(settings: ServeSettings) -> Ports:
    """A port the user named must be free; for the others the next free one does. Raises PortTaken."""
    taken = {port for port in (settings.http_port, settings.fleet_port, settings.client_port) if port}

    def choose(name: str, given: int | None, default: int) -> int:
        if given is not None:
            if is_port_free(settings.host, given):
                return given
            raise PortTaken(
                f"port {given} on {settings.host} is taken by another process; give another --{name}, "
                f"or leave it out and a free one is chosen"
            )
        for port in range(default, default + NUM_PORTS_TRIED):
            if port not in taken and is_port_free(settings.host, port):
                taken.add(port)
                return port
        raise PortTaken(f"no free port from {default} to {default + NUM_PORTS_TRIED - 1} on {settings.host}")

    return Ports(
        http=choose("http-port", settings.http_port, DEFAULT_HTTP_PORT),
        fleet=choose("fleet-port", settings.fleet_port, DEFAULT_FLEET_PORT),
        client=choose("client-port", settings.client_port, DEFAULT_CLIENT_PORT),
    )


def reachable_host(host: str) -> str:
    """Where our own workers and the self-test find a coordinator that listens on `host`."""
    return {"0.0.0.0": DEFAULT_HOST, "::": "::1"}.get(host, host)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedProcess:
    name: str
    command: list[str]
    env: dict[str, str]


def plan_coordinator(settings: ServeSettings, ports: Ports, model: str | None) -> PlannedProcess:
    command = [
        *_baton("coordinator", settings.coordinator_config),
        "--host", settings.host,
        "--http-port", str(ports.http),
        "--fleet-port", str(ports.fleet),
        "--client-port", str(ports.client),
        *_changed(settings, ("drain_timeout_s",)),
    ]  # fmt: skip
    if settings.engine == "simulated" and model is None:
        command += ["--tokenizer", "none"]
    elif model is not None:
        command += ["--model", model]
    return PlannedProcess(name="coordinator", command=command, env={})


def plan_workers(settings: ServeSettings, ports: Ports, model: str | None) -> list[PlannedProcess]:
    names = [f"prefill-{n}" for n in range(1, settings.num_prefill + 1)]
    names += [f"decode-{n}" for n in range(1, settings.num_decode + 1)]
    names += [f"both-{n}" for n in range(1, settings.num_both + 1)]
    return [
        _plan_worker(settings, ports, model, name, devices)
        for name, devices in zip(names, settings.device_groups(), strict=True)
    ]


def _plan_worker(
    settings: ServeSettings, ports: Ports, model: str | None, name: str, devices: str | None
) -> PlannedProcess:
    role = name.partition("-")[0]
    config = {
        "prefill": settings.prefill_config,
        "decode": settings.decode_config,
        "both": settings.both_config,
    }[role]
    host = reachable_host(settings.host)
    command = [
        *_baton(role, config),
        "--coordinator", f"[{host}]:{ports.fleet}" if ":" in host else f"{host}:{ports.fleet}",
        "--worker-id", name,
    ]  # fmt: skip
    if model is not None:
        command += ["--model", model]
    command += _changed(settings, SHARED_WITH_WORKERS)
    env = {} if devices is None else {"CUDA_VISIBLE_DEVICES": devices}
    return PlannedProcess(name=name, command=command, env=env)


def _changed(settings: ServeSettings, names: tuple[str, ...]) -> list[str]:
    """Flags for what differs from its default: an unchanged setting must not hide a role's YAML file."""
    flags = []
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if field.name in names and value != field.default:
            flags += ["--" + field.name.replace("_", "-"), str(value)]
    return flags


def _baton(role: str, config: str | None) -> list[str]:
    """`-m baton.cli` of this interpreter: the `baton` on PATH may belong to another environment."""
    command = [sys.executable, "-m", "baton.cli", role, "--exit-with-parent"]
    return command + (["--config", config] if config else [])
