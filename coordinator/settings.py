"""What a coordinator can be told. Flags and YAML keys derive from these fields."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from baton.policy import registry
from baton.settings import SettingsError, option
from baton.wire.endpoints import (
    DEFAULT_CLIENT_PORT,
    DEFAULT_FLEET_PORT,
    DEFAULT_HOST,
    DEFAULT_HTTP_PORT,
)
from coordinator.given_pace import given_pace


@dataclass(frozen=True, slots=True, kw_only=True)
class CoordinatorSettings:
    host: str = option(DEFAULT_HOST, "address to listen on; loopback unless told, since nothing is encrypted")
    http_port: int = option(DEFAULT_HTTP_PORT, "port of the HTTP door; 0 chooses a free one")
    fleet_port: int = option(DEFAULT_FLEET_PORT, "port workers connect to")
    client_port: int = option(DEFAULT_CLIENT_PORT, "port of the ZeroMQ door")
    model: str | None = option(
        None, "model path or name whose tokenizer the doors use; absent: what the first worker registers"
    )
    tokenizer: Literal["model", "none"] = option(
        "model", "`none` serves token-id prompts only and loads no tokenizer"
    )
    served_model_name: tuple[str, ...] = option(
        (), "name clients may use for the model; repeat for several; absent: its path and last component"
    )
    tool_call_parser: Literal["hermes"] | None = option(
        None,
        "turns tool calls in the text into `tool_calls` when tool_choice is auto; absent: text",
    )
    api_key: str | None = option(None, "clients must send it as a bearer token")
    prefill_policy: str = option(
        registry.DEFAULT_PREFILL,
        f"who computes a prompt: one of {', '.join(registry.NAMES)}; parameters after a colon",
        metavar="NAME[:ARG,...]",
    )
    decode_policy: str = option(
        registry.DEFAULT_DECODE,
        "who generates, among the workers with room for the KV: the same names",
        metavar="NAME[:ARG,...]",
    )
    kv_index_gib: float = option(
        2.0,
        "most memory for the index of who holds which prefix (8 million blocks); beyond it the least used "
        "is forgotten, which costs predictions only",
    )
    step_time: str | None = option(
        None,
        "the fleet's speed, for `stay or go`: a file of `baton profile`, or GPU:MODEL[:TP] for the roofline "
        "of a GPU and a model folder or shipped shape; absent: learnt from what workers report",
        metavar="PROFILE",
    )
    decision_log: str | None = option(
        None,
        "append each request's decisions with all facts to FILE, for `baton explain`; 64 MiB, then FILE.1; "
        "absent: not recorded, which is faster",
        metavar="FILE",
    )
    workload_log: str | None = option(
        None,
        "append each finished request's arrival and lengths to FILE, for `baton plan --watch` and `baton "
        "replay`; 16 MiB, then FILE.1; absent: not recorded",
        metavar="FILE",
    )
    max_queued: int = option(4096, "requests waiting for a worker; beyond it clients hear 429")
    max_attempts: int = option(
        3, "how often one request is tried in a row without getting on (16 tokens are getting on)"
    )
    decode_loss_policy: Literal["resume", "fail"] = option(
        "resume",
        "what happens when a decode worker is lost: go on elsewhere from the tokens given, or an error",
    )
    transfer_failure_policy: Literal["recompute", "fail"] = option(
        "recompute",
        "what happens when KV does not arrive: compute the prompt on the decode worker, or an error",
    )
    queue_timeout_s: float = option(120.0, "longest wait for a worker, seconds")
    prefill_timeout_s: float = option(300.0, "longest prefill, its queue on the worker included, seconds")
    handoff_timeout_s: float = option(
        20.0, "longest time from KV ready to the decode worker's first token, seconds; below the KV lease"
    )
    decode_stall_timeout_s: float = option(60.0, "longest silence between two tokens, seconds")
    join_test: bool = option(
        True,
        "before a worker gets requests, send one short prompt over it and another worker and compare the "
        "answer with the decode worker's own; a worker that fails is refused",
    )
    heartbeat_interval_s: float = option(0.5, "how often workers report, seconds")
    heartbeat_timeout_s: float = option(
        10.0, "silence after which a worker is given up, seconds; a starved laptop can be silent for several"
    )
    drain_timeout_s: float = option(30.0, "how long running requests may finish at shutdown, seconds")
    log_level: Literal["debug", "info", "warning", "error"] = option("info", "least severe log line shown")
    exit_with_parent: bool = option(False, "die when the process that started this one dies")

    def __post_init__(self) -> None:
        for name in ("prefill_policy", "decode_policy"):
            try:
                registry.by_name(getattr(self, name))
            except ValueError as error:
                raise SettingsError(f"{name}: {error}") from error
        if self.step_time is not None:
            try:
                given_pace(self.step_time)
            except ValueError as error:
                raise SettingsError(f"step_time: {error}") from error
        if not self.kv_index_gib > 0:
            raise SettingsError(f"kv_index_gib is {self.kv_index_gib:g}, expected more than 0")
        for name in ("http_port", "fleet_port", "client_port"):
            if not 0 <= getattr(self, name) < 65_536:  # uvloop would take one modulo 65,536
                raise SettingsError(f"{name} is {getattr(self, name)}, expected 0 to 65535")
        for name in ("max_queued", "max_attempts"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} is {getattr(self, name)}, expected at least 1")
        for name in (
            "queue_timeout_s", "prefill_timeout_s", "handoff_timeout_s", "decode_stall_timeout_s",
            "heartbeat_interval_s", "heartbeat_timeout_s",
        ):  # fmt: skip
            if not getattr(self, name) > 0:
                raise SettingsError(f"{name} is {getattr(self, name):g}, expected more than 0")
        if not self.drain_timeout_s >= 0:
            raise SettingsError(f"drain_timeout_s is {self.drain_timeout_s:g}, expected at least 0")
