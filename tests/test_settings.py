from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from baton.settings import SettingsError, as_flags, load, option, read_yaml, resolved


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    port: int = option(8000, "port")
    ratio: float = option(0.5, "a ratio, 50 % is usual")
    model: str | None = option(None, "a model")
    device: Literal["cpu", "cuda"] = option("cpu", "a device")
    is_loud: bool = option(False, "be loud")
    name: tuple[str, ...] = option((), "repeat for several")

    def __post_init__(self) -> None:
        if self.port == 13:
            raise SettingsError("port is 13, expected a lucky number")


def load_example(*argv: str) -> Example:
    return load(Example, list(argv), prog="example", description="An example.")


def yaml_file(folder: Path, text: str) -> str:
    path = folder / "settings.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_flag_wins_over_file_and_file_over_default(tmp_path: Path):
    config = yaml_file(tmp_path, "port: 1\nratio: 2\n")
    assert load_example("--config", config, "--port", "7") == Example(port=7, ratio=2.0)


def test_a_flag_with_the_default_value_still_wins_over_the_file(tmp_path: Path):
    config = yaml_file(tmp_path, "port: 1\n")
    assert load_example("--config", config, "--port", "8000").port == 8000


def test_no_flags_and_no_file_give_the_defaults():
    assert load_example() == Example()


def test_dashes_and_underscores_name_the_same_key(tmp_path: Path):
    assert load_example("--config", yaml_file(tmp_path, "is-loud: true")).is_loud
    assert load_example("--config", yaml_file(tmp_path, "is_loud: true")).is_loud


def test_repeated_flags_and_a_yaml_list_give_a_tuple(tmp_path: Path):
    assert load_example("--name", "a", "--name", "b").name == ("a", "b")
    assert load_example("--config", yaml_file(tmp_path, "name: [a, b]")).name == ("a", "b")


def test_null_in_the_file_is_none_where_none_is_allowed(tmp_path: Path):
    assert load_example("--config", yaml_file(tmp_path, "model: null")).model is None


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        pytest.param("prot: 1", "unknown key 'prot'; known: device,", id="unknown key"),
        pytest.param("port: many", "port is 'many', expected int", id="wrong type"),
        pytest.param("port: true", "port is True, expected int", id="a bool is not an int"),
        pytest.param("port: null", "port is None, expected int", id="null where a value is needed"),
        pytest.param("device: tpu", "device is 'tpu', expected one of cpu, cuda", id="not a choice"),
        pytest.param("name: a", "name is 'a', expected a list", id="a word where a list is expected"),
        pytest.param("- port", "holds a list, expected names and values", id="not a mapping"),
        pytest.param("port: [", "is not YAML", id="not YAML"),
        pytest.param("port: 13", "port is 13, expected a lucky number", id="refused by the role"),
    ],
)
def test_a_bad_file_stops_the_start_and_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, sentence: str
):
    with pytest.raises(SystemExit) as stop:
        load_example("--config", yaml_file(tmp_path, text))
    assert stop.value.code == 2
    assert sentence in capsys.readouterr().err


def test_an_absent_file_is_named(tmp_path: Path):
    with pytest.raises(SettingsError, match="cannot read .*absent.yaml: No such file"):
        read_yaml(Example, tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        pytest.param(["--port", "many"], "--port: invalid int value: 'many'", id="not a number"),
        pytest.param(["--prot", "1"], "unrecognized arguments: --prot 1", id="unknown flag"),
        pytest.param(["--por", "1"], "unrecognized arguments: --por 1", id="no abbreviations"),
        pytest.param(["--device", "tpu"], "invalid choice: 'tpu'", id="not a choice"),
    ],
)
def test_a_bad_flag_is_a_usage_error(capsys: pytest.CaptureFixture[str], argv: list[str], sentence: str):
    with pytest.raises(SystemExit) as stop:
        load_example(*argv)
    assert stop.value.code == 2
    assert sentence in capsys.readouterr().err


def test_help_names_every_option_and_default(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        load_example("--help")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "--is-loud" in text
    assert "50 % is usual (default: 0.5)" in text


@pytest.mark.parametrize(
    "settings",
    [
        Example(),
        Example(port=1, ratio=2.5, model="m", device="cuda", is_loud=True, name=("a", "b")),
        Example(name=("one with spaces",)),
    ],
)
def test_flags_made_from_settings_give_the_settings_again(settings: Example):
    assert load_example(*as_flags(settings)) == settings


def test_defaults_need_no_flags():
    assert as_flags(Example()) == []


def test_resolved_shows_one_line_per_setting():
    assert resolved(Example(port=1)).splitlines()[:2] == ["  port: 1", "  ratio: 0.5"]


def test_a_key_is_not_printed():
    @dataclass(frozen=True, slots=True, kw_only=True)
    class WithKey:
        api_key: str | None = option(None, "secret")

    assert resolved(WithKey(api_key="hunter2")) == "  api-key: (set)"
    assert resolved(WithKey()) == "  api-key: None"
