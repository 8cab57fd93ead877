"""A fleet in one YAML file: what `baton plan --fleet-file` writes and `scripts/start_fleet.sh` starts.

    coordinator:            settings of `baton coordinator`; may be empty
    prefill:                settings of every prefill worker, as in its --config file
      model: /models/qwen
      tensor_parallel_size: 2
    decode:                 the same for decode workers (and `both`, for workers of both phases)
    nodes:                  one entry per host, in order
      - prefill: {num_workers: 2, devices: "0,1;2,3"}
        decode: {num_workers: 1, devices: "4,5"}
    plan:                   what was predicted; people read it, scripts do not

A file is checked as a whole before anything starts. `python -m baton.launch.fleet_file FILE NODE DIRECTORY`
writes each role's settings to DIRECTORY and prints one line per fleet to start on that node:
role, number of workers, devices (or `-`), TP and PP, the settings file.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from baton.launch.devices import split_devices

ROLES = ("prefill", "decode", "both")
KEYS = {"coordinator", *ROLES, "nodes", "plan"}
DECIDED_BY_NODE = ("worker_id", "coordinator")
"""Settings that the start scripts give each worker."""


class FleetFileError(ValueError):
    """A sentence that names the file and the key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeFleet:
    """Workers of one role on one node."""

    num_workers: int
    devices: str | None = None
    """As `--devices` of the fleet scripts; None on CPUs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetFile:
    nodes: list[dict[str, NodeFleet]]
    """By role."""
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By role, and of the coordinator."""
    plan: dict[str, Any] = field(default_factory=dict)

    def num_workers(self, role: str) -> int:
        return sum(node[role].num_workers for node in self.nodes if role in node)


def read_fleet_file(path: str | Path) -> FleetFile:
    """Raises FleetFileError."""
    path = Path(path)
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FleetFileError(f"cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise FleetFileError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(document, dict):
        raise FleetFileError(f"{path} is no fleet file: it holds a {type(document).__name__}")
    if unknown := sorted(set(map(str, document)) - KEYS):
        raise FleetFileError(f"{path}: unknown key {unknown[0]!r}; known: {', '.join(sorted(KEYS))}")
    settings = {name: _mapping(document.get(name), path, name) for name in ("coordinator", *ROLES)}
    for role in ROLES:
        for key in DECIDED_BY_NODE:
            if key in settings[role]:
                raise FleetFileError(f"{path}: {role} sets {key}, which the start script gives each worker")
    listed = document.get("nodes")
    if not isinstance(listed, list) or not listed:
        raise FleetFileError(f"{path}: nodes is missing, expected one entry per host")
    nodes = [_node(entry, number, settings, path) for number, entry in enumerate(listed)]
    found = FleetFile(nodes=nodes, settings=settings, plan=_mapping(document.get("plan"), path, "plan"))
    if not found.num_workers("both") and not (found.num_workers("prefill") and found.num_workers("decode")):
        raise FleetFileError(
            f"{path} has {found.num_workers('prefill')} prefill and {found.num_workers('decode')} decode "
            "workers; a fleet needs one of each, or workers for both"
        )
    return found


def write_fleet_file(fleet: FleetFile, path: str | Path, *, heading: str) -> None:
    document: dict[str, Any] = {"coordinator": fleet.settings.get("coordinator", {})}
    document |= {role: fleet.settings[role] for role in ROLES if fleet.num_workers(role)}
    document["nodes"] = [
        {
            role: {"num_workers": part.num_workers} | ({"devices": part.devices} if part.devices else {})
            for role, part in node.items()
        }
        for node in fleet.nodes
    ]
    document["plan"] = fleet.plan
    comment = "".join(f"# {line}\n" for line in heading.splitlines())
    text = yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=100)
    Path(path).write_text(comment + text, encoding="utf-8")


def _node(entry: Any, number: int, settings: dict[str, dict[str, Any]], path: Path) -> dict[str, NodeFleet]:
    where = f"nodes[{number}]"
    node = _mapping(entry, path, where)
    if unknown := sorted(set(node) - set(ROLES)):
        raise FleetFileError(f"{path}: {where}: unknown role {unknown[0]!r}, expected {', '.join(ROLES)}")
    found = {}
    for role in (role for role in ROLES if role in node):
        part = _mapping(node[role], path, f"{where}.{role}")
        if unknown := sorted(set(part) - {"num_workers", "devices"}):
            raise FleetFileError(f"{path}: {where}.{role}: unknown key {unknown[0]!r}")
        count, devices = part.get("num_workers"), part.get("devices")
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise FleetFileError(f"{path}: {where}.{role}.num_workers is {count!r}, expected 1 or more")
        is_cuda = settings[role].get("device") == "cuda"
        if is_cuda != (devices is not None):
            need = (
                "devices is missing, the workers' device is cuda"
                if is_cuda
                else "devices names GPUs, device is cpu"
            )
            raise FleetFileError(f"{path}: {where}.{role}: {need}")
        if devices is not None:
            ranks = settings[role].get("tensor_parallel_size", 1) * settings[role].get(
                "pipeline_parallel_size", 1
            )
            try:
                split_devices(str(devices), count, ranks)
            except ValueError as error:
                raise FleetFileError(f"{path}: {where}.{role}: {error}") from None
        found[role] = NodeFleet(num_workers=count, devices=None if devices is None else str(devices))
    return found


def _mapping(value: Any, path: Path, where: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise FleetFileError(f"{path}: {where} is {value!r}, expected names and values")
    return value


def main(argv: list[str]) -> int:
    path, number, directory = argv
    try:
        fleet = read_fleet_file(path)
        if not number.isdigit() or int(number) >= len(fleet.nodes):
            raise FleetFileError(f"{path} has nodes 0 to {len(fleet.nodes) - 1}, not {number}")
    except FleetFileError as error:
        print(error, file=sys.stderr)
        return 2
    Path(directory).mkdir(parents=True, exist_ok=True)
    node = fleet.nodes[int(number)]
    for role in ("coordinator", *node):
        config = Path(directory) / f"{role}.yaml"
        config.write_text(yaml.safe_dump(fleet.settings[role], sort_keys=False), encoding="utf-8")
        part = node.get(role, NodeFleet(num_workers=1))
        of_role = fleet.settings[role]
        sizes = [of_role.get(f"{name}_parallel_size", 1) for name in ("tensor", "pipeline")]
        print(role, part.num_workers, part.devices or "-", *sizes, config)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
