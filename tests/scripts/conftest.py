from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from baton.launch.processes import wait_until_empty
from tests.scripts.harness import REPOSITORY, Checkout, Serve


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Serve]]:
    started: list[Serve] = []

    def start(*flags: str, engine: str = "simulated") -> Serve:
        started.append(Serve(tmp_path / f"run-{len(started)}", *flags, engine=engine))
        return started[-1]

    yield start
    for one in started:
        children = list(one.children().values())
        one.process.kill()
        one.process.wait()
        for child in children:
            child.kill()
        assert wait_until_empty(children, 20.0)


@pytest.fixture(scope="session")
def environment() -> None:
    """Up to date before any linked checkout looks at it: those must find nothing to install."""
    command = f'source "{REPOSITORY}/scripts/env.sh"; ensure_environment cpu dev'
    subprocess.run(["bash", "-euo", "pipefail", "-c", command], check=True, timeout=600, capture_output=True)


@pytest.fixture
def checkout(tmp_path: Path, environment: None) -> Iterator[Checkout]:
    root = tmp_path / "checkout"
    root.mkdir()
    made = Checkout(root)
    yield made
    left = list(made.records().values())
    for process in left:
        process.kill()
    assert wait_until_empty(left, 20.0)
