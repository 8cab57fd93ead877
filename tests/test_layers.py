"""Imports point down. Read from the source, so that an import inside a function counts as well, and
nothing has to be importable to be checked."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

LAYERS: list[list[str]] = [
    # Lowest first. A module may import its own group and any lower layer; groups of one layer are
    # siblings and never import each other. The longest matching prefix decides.
    [
        "baton.contract",
        "baton.clock",
        "baton.settings",
        "baton.process_guard",
        "baton.ports",
        "baton.step_time",
        "baton.named_spec",
        "baton.handoff",
    ],
    [
        "baton.telemetry",
        "baton.demo_model",
        "baton.workload",
        "baton.history",
    ],
    ["baton.wire", "baton.transfer", "baton.policy", "baton.scheduling"],
    ["baton.simulation"],
    ["baton.engine", "baton.client", "baton.replay", "baton.launch"],
    ["baton.worker"],
    ["coordinator", "prefill_worker", "decode_worker", "placement"],
    ["baton.submit", "baton.explain", "baton.profiling", "baton.doctor"],
    ["baton.cli"],
]
"""baton.contract and its siblings of the first layer import nothing of ours but baton.contract."""

ONLY_IN = {
    "vllm": ("baton.engine.vllm.", "baton.transfer.nixl_"),
    "nixl": ("baton.transfer.nixl_",),
    "zmq": ("baton.wire",),
}

PURE = (
    "baton.contract",
    "baton.policy",
    "baton.scheduling",
    "baton.simulation",
    "baton.replay",
    "baton.step_time",
    "baton.handoff",
    "baton.history",
    "baton.workload",
    "baton.clock",
    "baton.settings",
    "baton.process_guard",
    "placement",
)
HEAVY = ("torch", "vllm", "nixl", "zmq", "transformers")

NEVER = [
    ("coordinator", "baton.engine"),
    ("coordinator", "baton.transfer"),
    ("coordinator", "baton.worker"),
    ("placement", "baton.engine"),
    ("placement", "baton.transfer"),
    # The launcher starts roles as processes; only the command line imports them.
    *[(entry, role) for entry in ("baton.launch", "baton.doctor", "baton.submit", "baton.explain")
      for role in ("coordinator", "prefill_worker", "decode_worker", "placement")],
]  # fmt: skip

PACKAGES = ("baton", "coordinator", "prefill_worker", "decode_worker", "placement")


def modules() -> dict[str, Path]:
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(module: str, path: Path) -> Iterator[tuple[int, str]]:
    """(line, full name) of everything imported; `from a import b` yields a.b where that is a module."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno} imports relatively"
            source = node.module or ""
            for alias in node.names:
                full = f"{source}.{alias.name}"
                yield node.lineno, full if full in MODULES else source


def is_within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def place(module: str) -> tuple[int, str] | None:
    """(layer, group) of a module of ours; None for `baton` itself, which holds nothing."""
    matches = [
        (len(group), level, group)
        for level, layer in enumerate(LAYERS)
        for group in layer
        if is_within(module, group)
    ]
    return max(matches)[1:] if matches else None


def problem(module: str, imported: str) -> str | None:
    root = imported.partition(".")[0]
    if root in ONLY_IN and not any(module.startswith(prefix) for prefix in ONLY_IN[root]):
        return f"{root} belongs in {' and '.join(ONLY_IN[root])}* only"
    if root in HEAVY and any(is_within(module, prefix) for prefix in PURE):
        return f"{module} must stay free of {root}"
    if root not in PACKAGES:
        return None
    for above, below in NEVER:
        if is_within(module, above) and is_within(imported, below):
            return f"{above} never reaches {below}"
    own, other = place(module), place(imported)
    if own is None or other is None or own[1] == other[1] or other[1] == "baton.contract":
        return None
    if other[0] > own[0]:
        return f"{other[1]} is above {own[1]}"
    if other[0] == own[0]:
        return f"{other[1]} and {own[1]} are siblings"
    return None


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module: str):
    problems = [
        f"{MODULES[module].relative_to(ROOT)}:{line} imports {imported}: {reason}"
        for line, imported in imports(module, MODULES[module])
        if (reason := problem(module, imported))
    ]
    assert problems == []


def test_every_module_has_a_place():
    homeless = [module for module in MODULES if module != "baton" and place(module) is None]
    assert homeless == []


@pytest.mark.parametrize(
    ("module", "imported"),
    [
        ("coordinator.core", "prefill_worker.worker"),
        ("coordinator.core", "baton.engine.base"),
        ("baton.worker.runtime", "zmq"),
        ("baton.engine.simulated.engine", "vllm.sampling_params"),
        ("baton.policy.base", "torch"),
        ("baton.contract.codec", "baton.wire.endpoints"),
        ("baton.wire.channels", "baton.transfer.lease"),
        ("baton.launch.serve", "coordinator.settings"),
    ],
)
def test_the_check_itself_finds(module: str, imported: str):
    assert problem(module, imported) is not None
