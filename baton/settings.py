"""Settings of a role: flag > YAML file > default, the same names in all three.

A role declares one frozen dataclass whose fields are made with `option(...)`; flags derive from
it (`http_port` becomes `--http-port`). An unknown key or an unreadable value stops the start and
is named. Types: str, int, float, bool, Literal[...], any of them `| None`, and `tuple[str, ...]`
(a repeated flag, a YAML list).
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import types
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import yaml

S = TypeVar("S")


class SettingsError(Exception):
    """A sentence that names the key."""


def option(default: Any, help: str, *, metavar: str | None = None) -> Any:
    """A dataclass field with its meaning, unit and the reason for its default beside it."""
    return dataclasses.field(default=default, metadata={"help": help, "metavar": metavar})


def load(cls: type[S], argv: list[str], *, prog: str, description: str) -> S:
    """Resolve `cls` from a command line that may name a `--config FILE`.

    Exits with status 2 and a sentence for a bad flag or file; `--help` prints every option.
    """
    parser = argparse.ArgumentParser(
        prog=prog, description=description, allow_abbrev=False,
        formatter_class=argparse.HelpFormatter,
    )  # fmt: skip
    parser.add_argument("--config", metavar="FILE", help="YAML file with the same names")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for name, field in fields.items():
        _add_flag(parser, name, field, hints[name])
    flags = vars(parser.parse_args(argv))
    config = flags.pop("config", None)
    try:
        values = read_yaml(cls, Path(config)) if config else {}
        values.update({k: tuple(v) if isinstance(v, list) else v for k, v in flags.items()})
        return cls(**values)
    except SettingsError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def read_yaml(cls: type[Any], path: Path) -> dict[str, Any]:
    """The file's values, checked against `cls`. Raises SettingsError naming file and key."""
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise SettingsError(f"cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} is not YAML: {error}") from error
    if not isinstance(document, dict):
        raise SettingsError(f"{path} holds a {type(document).__name__}, expected names and values")
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in document.items():
        name = str(key).replace("-", "_")
        if name not in hints:
            raise SettingsError(f"{path}: unknown key {key!r}; known: {', '.join(sorted(hints))}")
        values[name] = _checked(name, value, hints[name])
    return values


def resolved(settings: Any) -> str:
    """One line per setting, as start-up prints them; keys that clients must present stay hidden."""
    lines = []
    for name, value in dataclasses.asdict(settings).items():
        is_secret = name.endswith("_key") and value is not None
        lines.append(f"  {name.replace('_', '-')}: {'(set)' if is_secret else value}")
    return "\n".join(lines)


def as_flags(settings: Any) -> list[str]:
    """The command line that gives these settings again; defaults and absent values are left out."""
    flags: list[str] = []
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if value is None or value == field.default:
            continue
        flag = "--" + field.name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(flag if value else "--no-" + flag[2:])
        elif isinstance(value, tuple):
            flags += [part for item in value for part in (flag, item)]
        else:
            flags += [flag, str(value)]
    return flags


def _unwrap(hint: Any) -> tuple[Any, bool]:
    """(the type without None, whether None is allowed)"""
    if get_origin(hint) in (Union, types.UnionType):
        inner = [arg for arg in get_args(hint) if arg is not type(None)]
        assert len(inner) == 1, hint
        return inner[0], True
    return hint, False


def _add_flag(parser: argparse.ArgumentParser, name: str, field: Any, hint: Any) -> None:
    flag = "--" + name.replace("_", "-")
    base, _ = _unwrap(hint)
    # SUPPRESS: an absent flag must not hide the YAML file's value.
    common: dict[str, Any] = {"default": argparse.SUPPRESS, "help": _help(field)}
    if base is bool:
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, **common)
    elif get_origin(base) is tuple:
        parser.add_argument(flag, action="append", metavar=field.metadata["metavar"], **common)
    elif get_origin(base) is Literal:
        parser.add_argument(flag, choices=get_args(base), **common)
    else:
        parser.add_argument(flag, type=base, metavar=field.metadata["metavar"], **common)


def _help(field: Any) -> str:
    text = str(field.metadata["help"]).replace("%", "%%")
    return f"{text} (default: {field.default})"


def _checked(name: str, value: Any, hint: Any) -> Any:
    base, is_optional = _unwrap(hint)
    if value is None and is_optional:
        return None
    if get_origin(base) is Literal:
        if value in get_args(base):
            return value
        raise SettingsError(f"{name} is {value!r}, expected one of {', '.join(get_args(base))}")
    if get_origin(base) is tuple:
        if isinstance(value, list):
            return tuple(str(item) for item in value)
        raise SettingsError(f"{name} is {value!r}, expected a list")
    if base is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, base) and not (base is int and isinstance(value, bool)):
        return value
    raise SettingsError(f"{name} is {value!r}, expected {base.__name__}")
