"""What the documents show must exist: scripts, flags, files, tests."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from baton.cli import COMMANDS
from baton.doctor import DoctorSettings
from baton.launch.plan import ServeSettings
from baton.worker.both import BothWorkerSettings
from coordinator.settings import CoordinatorSettings
from decode_worker.settings import DecodeWorkerSettings
from placement.settings import PlanSettings
from prefill_worker.settings import PrefillWorkerSettings

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "docs/routing.md",
    "docs/planning.md",
    "docs/reliability.md",
]


def flags_of(settings: type) -> set[str]:
    return {"--" + field.name.replace("_", "-") for field in dataclasses.fields(settings)} | {
        "--config",
        "--help",
    }


WORKER_FLEET = {"--num-workers", "--devices"}
KNOWN_FLAGS = {
    "serve.sh": flags_of(ServeSettings),
    "start_coordinator.sh": flags_of(CoordinatorSettings),
    "start_prefill_fleet.sh": flags_of(PrefillWorkerSettings) | WORKER_FLEET,
    "start_decode_fleet.sh": flags_of(DecodeWorkerSettings) | WORKER_FLEET,
    "start_both_fleet.sh": flags_of(BothWorkerSettings) | WORKER_FLEET,
    "start_fleet.sh": {"--node", "--coordinator"},
    "plan.sh": flags_of(PlanSettings),
    "plan": flags_of(PlanSettings),
    "submit.sh": {"--address", "--max-tokens"},
    "stop_fleet.sh": {"--timeout-s"},
    "test.sh": {"--quick"},
    "doctor": flags_of(DoctorSettings),
    "submit": {"--address", "--max-tokens"},
    "coordinator": flags_of(CoordinatorSettings),
    "explain": {"--last", "--log", "--replay"},
    "story": {"--run"},
    "chaos.sh": {"--quick", "--save", "--json", "--minutes", "--transfer"},
}


def commands(text: str) -> list[str]:
    """Shell lines of the code blocks, continuation lines joined."""
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL))
    lines = blocks.replace("\\\n", " ").splitlines()
    return [line.partition("  #")[0].strip() for line in lines if line.strip() and not line.startswith("#")]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_shown_commands_exist(document: str):
    for command in commands((ROOT / document).read_text(encoding="utf-8")):
        script = re.match(r"scripts/(\S+)", command)
        role = re.match(r"\.venv/bin/baton (\S+)", command)
        if script:
            assert (ROOT / "scripts" / script[1]).is_file(), command
        if role:
            assert role[1] in COMMANDS, command
        name = script or role
        if name:
            unknown = set(re.findall(r"(?<=\s)--[a-z-]+", command)) - KNOWN_FLAGS.get(name[1], set())
            assert not unknown, command


@pytest.mark.parametrize("document", DOCUMENTS)
def test_linked_and_named_files_exist(document: str):
    text = (ROOT / document).read_text(encoding="utf-8")
    named = re.findall(r"\]\(([A-Za-z_/]+\.?[a-z]*)\)", text) + re.findall(r"`(scripts/[a-z_]+\.sh)`", text)
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_each_known_failure_names_tests_that_exist():
    text = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    section = text.partition("## What users of such systems run into\n")[2].partition("\n## ")[0]
    _, _, *rows = [line for line in section.splitlines() if line.startswith("|")]
    assert len(rows) >= 17
    for row in rows:
        named = re.findall(r"`(tests/[a-z_/]+\.py)::(test_\w+)`", row)
        assert named, f"no test: {row}"
        for file, name in named:
            code = (ROOT / file).read_text(encoding="utf-8")
            assert re.search(rf"^(async )?def {name}\(", code, re.MULTILINE), f"{file}::{name}"


def test_yaml_shown_is_accepted(tmp_path: Path):
    from baton.settings import read_yaml

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (tmp_path / "prefill.yaml").write_text(re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)[0])
    assert read_yaml(PrefillWorkerSettings, tmp_path / "prefill.yaml")["kv_lease_s"] == 30
