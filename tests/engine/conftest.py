"""Real engines are started once per module and shared; the tests clean up what they hold."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from baton.demo_model import build_demo_model
from tests.engine.pair import EnginePair


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """vLLM and torch warn while they load and run; those warnings are not ours to fix."""
    for item in items:
        if "vllm_pair" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.filterwarnings("default"))
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def demo_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_demo_model(tmp_path_factory.mktemp("model") / "demo")


@pytest.fixture(scope="module")
def vllm_pair(demo_model: Path) -> Iterator[EnginePair]:
    pair = EnginePair(demo_model)
    pair.run(pair.start(prefill={"kv_load_failure_policy": "recompute"}), timeout_s=240.0)
    yield pair
    pair.close()
