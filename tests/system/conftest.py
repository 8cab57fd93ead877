"""Fleets for system tests. Real engines are costly on few cores, so there is one real fleet at a time:
a test that wants other settings ends the one before it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest

from baton.demo_model import build_demo_model
from tests.system.cases import MAX_MODEL_LEN
from tests.system.fleet import STARTED, Fleet
from tests.system.stories import stories

REAL_FIXTURES = {"real_fleet", "start_real_fleet", "expected"}

# Longer prompts than 512 tokens are computed in chunks, which they are in practice.
REAL_WORKER = (
    "--max-model-len",
    str(MAX_MODEL_LEN),
    "--kv-cache-gib",
    "0.25",
    "--max-num-batched-tokens",
    "512",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if REAL_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)
            item.add_marker(pytest.mark.timeout(600))
    here = [index for index, item in enumerate(items) if item.path.parent == Path(__file__).parent]
    ordered = sorted((items[index] for index in here), key=_wants_other_settings)
    for index, item in zip(here, ordered, strict=True):
        items[index] = item


def _wants_other_settings(item: pytest.Item) -> bool:
    """Those that are content with the fleet as it comes are first: it is started once for all of them."""
    fixtures = set(getattr(item, "fixturenames", ()))
    params = getattr(item, "callspec", None)
    return not fixtures & {"real_fleet", "answered"} and not (params and "real" in params.params.values())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failure prints the whole story of the requests it is about."""
    report = yield
    if report.when == "call" and report.failed:
        for fleet in list(STARTED.values()):
            if fleet.members and (told := stories(fleet.folder, report.longreprtext)):
                report.sections.append((f"requests of {fleet.folder.name}", told))
    return report


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_demo_model(tmp_path_factory.mktemp("model") / "demo")


StartFleet = Callable[..., Fleet]


class _OneFleet:
    """The real fleet that is up, if any, and the settings it was started with."""

    def __init__(self, model: Path, make_folder: Callable[[str], Path]) -> None:
        self._model = model
        self._make_folder = make_folder
        self._settings: object = None
        self.fleet: Fleet | None = None

    def start(
        self,
        *,
        coordinator: tuple[str, ...] = (),
        prefill: tuple[str, ...] = (),
        decode: tuple[str, ...] = (),
        roles: tuple[str, ...] = ("prefill", "decode"),
    ) -> Fleet:
        settings = (coordinator, prefill, decode, roles)
        if self.fleet is not None and self._settings == settings and self.fleet.members:
            return self.fleet
        self.stop()
        fleet = self.fleet = Fleet(self._make_folder("fleet"), model=self._model)
        self._settings = settings
        fleet.start_coordinator(*coordinator)
        flags = {"prefill": prefill, "decode": decode}
        for number, role in enumerate(roles):
            name = f"{role}-{roles[: number + 1].count(role)}"
            fleet.start_worker(role, name, *REAL_WORKER, *flags.get(role, ()))
        fleet.wait_until_ready()
        return fleet

    def stop(self) -> None:
        if self.fleet is not None:
            fleet, self.fleet = self.fleet, None
            fleet.stop()


@pytest.fixture(scope="session")
def _one_fleet(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[_OneFleet]:
    one_fleet = _OneFleet(model, tmp_path_factory.mktemp)
    yield one_fleet
    one_fleet.stop()


@pytest.fixture
def start_real_fleet(_one_fleet: _OneFleet) -> StartFleet:
    """Workers on vLLM, one prefill and one decode unless told, idle. Keyword arguments are flags by role,
    and `roles`."""
    return _one_fleet.start


@pytest.fixture
def real_fleet(_one_fleet: _OneFleet) -> Fleet:
    """With the settings that the reference run has."""
    fleet = _one_fleet.start()
    fleet.wait_until_idle(40.0)  # the test before may have left a lease to end
    return fleet
