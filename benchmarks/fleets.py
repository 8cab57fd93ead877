"""Everybody who stands in front of engines, started the same way, before backends that answer at once.

A `Subject` is one system under test: the port clients talk to, the processes whose CPU is its own
(the router's tree, the coordinator's tree), and the stand-in backends, whose CPU is counted apart.
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from baton.demo_model import build_demo_model
from benchmarks.layout import BINARIES, DEMO_MODEL, SCRATCH
from benchmarks.peers import DYNAMO, SGLANG_ROUTER, VLLM_ROUTER
from benchmarks.servers import Server, accepts, answers, free_port

START_TIMEOUT_S = 60.0
URL = "http://127.0.0.1"

BATON = "baton"
VLLM_PD = "vllm-router P/D"
VLLM_PD_TEXT = "vllm-router P/D, text"
"""The same router given a text prompt of the same class, which it parses much faster than ids."""
VLLM_PLAIN = "vllm-router plain"
SGLANG_PD = "sglang-router P/D"
SGLANG_PLAIN = "sglang-router plain"
DYNAMO_PD = "dynamo P/D"
DYNAMO_PLAIN = "dynamo aggregated"
DIRECT = "direct"


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    name: str
    port: int
    servers: list[Server]
    """Their CPU is the subject's."""
    backends: list[Server] = field(default_factory=list)
    prompt: Literal["ids", "text"] = "ids"
    """sglang-router 0.3.2 refuses token ids on /v1/completions; it gets text."""
    model: str = "mock"


@contextmanager
def routers(tick_us: int) -> Iterator[dict[str, Subject]]:
    """The Rust routers, P/D and plain, and the mock backend itself (`direct`)."""
    prefill, decode, second, bootstrap = (free_port() for _ in range(4))
    with ExitStack() as stack:
        mock = Server(
            f"mock-{tick_us}",
            [
                BINARIES / "mock_backend", "--tick-us", tick_us, "--prefill-port", prefill,
                "--decode-port", decode, "--decode-port", second,
            ],
        )  # fmt: skip
        stack.enter_context(mock).wait_until(accepts(decode), START_TIMEOUT_S, "no listening socket")

        def add(name: str, argv: list[object], prompt: Literal["ids", "text"]) -> Subject:
            port, metrics = free_port(), free_port()
            common: list[object] = ["--host", "127.0.0.1", "--port", port, "--prometheus-port", metrics]
            log_name = f"{name.replace(' ', '-').replace('/', '')}-{tick_us}"
            server = stack.enter_context(Server(log_name, [str(part) for part in [*argv, *common]]))
            server.wait_until(answers(f"{URL}:{port}/health"), START_TIMEOUT_S, "GET /health")
            return Subject(name=name, port=port, servers=[server], backends=[mock], prompt=prompt)

        vllm: list[object] = [VLLM_ROUTER.folder / "bin" / "vllm-router", "--log-level", "warning"]
        sglang: list[object] = [
            SGLANG_ROUTER.python, "-m", "sglang_router.launch_router", "--log-level", "warn",
        ]  # fmt: skip
        pair = [f"{URL}:{decode}", f"{URL}:{second}"]
        subjects = {
            DIRECT: Subject(name=DIRECT, port=decode, servers=[mock]),
            VLLM_PD: add(
                VLLM_PD,
                [
                    *vllm, "--vllm-pd-disaggregation", "--prefill", f"{URL}:{prefill}",
                    "--decode", f"{URL}:{decode}", "--kv-connector", "nixl", "--policy", "round_robin",
                ],
                "ids",
            ),
            VLLM_PLAIN: add(VLLM_PLAIN, [*vllm, "--worker-urls", *pair, "--policy", "round_robin"], "ids"),
            SGLANG_PD: add(
                SGLANG_PD,
                [
                    *sglang, "--pd-disaggregation", "--prefill", f"{URL}:{prefill}", bootstrap,
                    "--decode", f"{URL}:{decode}", "--policy", "random",
                ],
                "text",
            ),
            SGLANG_PLAIN: add(SGLANG_PLAIN, [*sglang, "--worker-urls", *pair, "--policy", "random"], "text"),
        }  # fmt: skip
        subjects[VLLM_PD_TEXT] = dataclasses.replace(subjects[VLLM_PD], name=VLLM_PD_TEXT, prompt="text")
        yield subjects


@contextmanager
def baton(tick_us: int, *, has_tokenizer: bool) -> Iterator[dict[str, Subject]]:
    """The real coordinator before one process that plays a prefill and a decode worker."""
    http, fleet, client = (free_port() for _ in range(3))
    model = str(DEMO_MODEL) if has_tokenizer else "instant"
    suffix = f"{'text' if has_tokenizer else 'ids'}-{tick_us}"
    with ExitStack() as stack:
        coordinator = Server(
            f"coordinator-{suffix}",
            [sys.executable, "-m", "coordinator", "--http-port", str(http), "--fleet-port", str(fleet)]
            + ["--client-port", str(client), "--log-level", "warning"]
            + (["--model", model] if has_tokenizer else ["--tokenizer", "none"]),
        )
        stack.enter_context(coordinator)
        coordinator.wait_until(accepts(fleet), START_TIMEOUT_S, "no fleet socket")
        worker = Server(
            f"instant-worker-{suffix}",
            [
                sys.executable, "-m", "benchmarks.instant_worker", "--coordinator", f"127.0.0.1:{fleet}",
                "--model", model, "--tick-us", str(tick_us),
            ],
        )  # fmt: skip
        stack.enter_context(worker)
        coordinator.wait_until(answers(f"{URL}:{http}/ready"), START_TIMEOUT_S, "GET /ready")
        yield {
            BATON: Subject(
                name=BATON, port=http, servers=[coordinator], backends=[worker], model=model,
                prompt="text" if has_tokenizer else "ids",
            )
        }  # fmt: skip


@contextmanager
def dynamo() -> Iterator[dict[str, Subject]]:
    """Dynamo's frontend before its own mocker, once aggregated and once 1P+1D, each with a
    discovery folder of its own; the frontend tokenises with the demo model's tokenizer."""
    with ExitStack() as stack:
        subjects = {}
        for name, roles in ((DYNAMO_PLAIN, ["agg"]), (DYNAMO_PD, ["prefill", "decode"])):
            slug = name.replace(" ", "-").replace("/", "")
            folder = SCRATCH / f"{slug}-discovery"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            environment = {"DYN_FILE_KV": str(folder), "HF_HUB_OFFLINE": "1", "DYN_LOG": "error"}
            planes = ["--discovery-backend", "file", "--request-plane", "tcp", "--event-plane", "zmq"]
            port = free_port()
            mockers = []
            for role in roles:
                argv = [
                    str(DYNAMO.python), "-m", "dynamo.mocker", "--model-path", str(DEMO_MODEL),
                    "--model-name", "tiny", "--speedup-ratio", "100000", "--num-workers", "1", *planes,
                ]  # fmt: skip
                if role != "agg":
                    argv += ["--disaggregation-mode", role]
                if role == "prefill":
                    argv += ["--bootstrap-ports", str(free_port())]
                mockers.append(stack.enter_context(Server(f"{slug}-{role}", argv, environment)))
            frontend = Server(
                f"{slug}-frontend",
                [
                    str(DYNAMO.python), "-m", "dynamo.frontend", "--http-host", "127.0.0.1",
                    "--http-port", str(port), "--router-mode", "kv", *planes,
                ],
                environment,
            )  # fmt: skip
            stack.enter_context(frontend)
            is_listed = answers(f"{URL}:{port}/v1/models", containing=b'"tiny"')
            frontend.wait_until(is_listed, START_TIMEOUT_S, "the model in GET /v1/models")
            subjects[name] = Subject(
                name=name, port=port, servers=[frontend], backends=mockers, prompt="text", model="tiny"
            )
        yield subjects


def demo_model() -> Path:
    """The product's demo model, made if it is not there."""
    if not (DEMO_MODEL / "config.json").exists():
        build_demo_model(DEMO_MODEL)
    return DEMO_MODEL
