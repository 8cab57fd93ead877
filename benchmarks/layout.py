"""Where the benchmarks keep things. Everything but the results is ignored by git."""

from __future__ import annotations

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
PEERS = REPOSITORY / ".peers"
"""Peers' virtual environments and compiled tools."""
BINARIES = PEERS / "bin"
SCRATCH = PEERS / "run"
"""Logs, request bodies and discovery files of the latest run."""
RESULTS = REPOSITORY / "benchmarks" / "results"
NATIVE = REPOSITORY / "benchmarks" / "native"
DEMO_MODEL = REPOSITORY / ".models" / "baton-demo"
TRACES = REPOSITORY.parent / "shared" / "traces"
"""Slices of public traces, where nobody said where else they are."""
