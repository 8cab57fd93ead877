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
MANUAL = ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "benchmarks/README.md"] + [
    f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))
]
PACKAGES = [
    "baton",
    "coordinator",
    "prefill_worker",
    "decode_worker",
    "placement",
    "benchmarks",
    "tests/chaos",
]
FLAG = r"(?<![\w-])--[a-z][a-z0-9-]*"
OF_OTHERS = {"--vllm-pd-disaggregation", "--kv-connector", "--router-mode"}


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


def manual(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def existing_flags() -> set[str]:
    """Fields that are options, and all that is written like a flag in code and scripts."""
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    files += (ROOT / "scripts").glob("*.sh")
    code = "\n".join(path.read_text(encoding="utf-8") for path in files)
    flags = {"--" + name.replace("_", "-") for name in re.findall(r"(\w+): [^\n=]*= option\(", code)}
    return flags | {"--no" + flag[1:] for flag in flags} | set(re.findall(FLAG, code))


@pytest.mark.parametrize("document", [name for name in MANUAL if name != "docs/clients.md"])
def test_named_flags_exist(document: str, existing_flags: set[str]):
    """docs/clients.md is about flags of other programs."""
    assert set(re.findall(FLAG, manual(document))) - existing_flags - OF_OTHERS == set()


def test_named_headers_exist():
    doors = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "coordinator" / "http").glob("*.py"))
    for document in MANUAL:
        for name in re.findall(r"`x-baton-([a-z-]+)`", manual(document)):
            assert name in doors, f"{document}: x-baton-{name}"


def test_every_metric_is_told_and_every_one_told_exists():
    from coordinator.metrics import Metrics

    wiring = (ROOT / "coordinator" / "process.py").read_text(encoding="utf-8")
    exported = set(re.findall(r"# TYPE (baton_\w+) (?:counter|histogram)", Metrics().render()[0].decode()))
    exported |= set(re.findall(r'"(baton_\w+)"', wiring))
    section = manual("docs/operations.md").partition("\n## Metrics\n")[2].partition("\n## ")[0]
    assert set(re.findall(r"`(baton_\w+)", section)) == exported
    for document in MANUAL:
        for name in re.findall(r"`(baton_\w+)", manual(document)):
            assert any(metric.startswith(name) for metric in exported), f"{document}: {name}"


@pytest.mark.parametrize("document", [*MANUAL, "CHANGELOG.md"])
def test_links_headings_and_paths_exist(document: str):
    text = manual(document)
    for target, _, heading in (link.partition("#") for link in re.findall(r"\]\(([^)\s]+)\)", text)):
        if target.startswith("http"):
            continue
        path = (ROOT / document).parent / target if target else ROOT / document
        assert path.exists(), target
        if heading:
            headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = [re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in headings]
            assert heading in slugs, f"{target}#{heading}"
    top = "|".join(
        ["baton", "coordinator", "prefill_worker", "decode_worker", "placement", "scripts", "tests"]
    )
    for name in re.findall(rf"`((?:{top}|docs|benchmarks|requirements)/[\w./*-]+)", text):
        assert "NAME" in name or any(ROOT.glob(name.rstrip("/"))), f"{document}: {name}"


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
