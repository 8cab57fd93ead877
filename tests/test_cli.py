from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest

from baton import cli
from baton.ports import free_port


def test_a_command_gets_the_rest_of_the_line(monkeypatch: pytest.MonkeyPatch):
    seen: list[list[str]] = []

    def fake_import(module: str) -> SimpleNamespace:
        assert module == "coordinator.__main__"

        def main(argv: list[str]) -> int:
            seen.append(argv)
            return 7

        return SimpleNamespace(main=main)

    monkeypatch.setattr("importlib.import_module", fake_import)
    assert cli.main(["coordinator", "--http-port", "1"]) == 7
    assert seen == [["--http-port", "1"]]


def test_no_command_is_a_usage_error_that_lists_the_commands(capsys: pytest.CaptureFixture[str]):
    assert cli.main([]) == 2
    assert "serve" in capsys.readouterr().err


def test_an_unknown_command_is_named(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["sevre"]) == 2
    assert "no command 'sevre'" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["help"]])
def test_help_lists_every_command(capsys: pytest.CaptureFixture[str], argv: list[str]):
    assert cli.main(argv) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in cli.COMMANDS)


def test_version_is_the_installed_one(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("baton 0.")


def test_a_missing_package_is_a_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def no_yaml(module: str) -> SimpleNamespace:
        raise ModuleNotFoundError("No module named 'yaml'", name="yaml")

    monkeypatch.setattr("importlib.import_module", no_yaml)
    assert cli.main(["doctor"]) == 1
    assert "'yaml' is not installed" in capsys.readouterr().err


def test_ctrl_c_is_130(monkeypatch: pytest.MonkeyPatch):
    def interrupted(argv: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("importlib.import_module", lambda module: SimpleNamespace(main=interrupted))
    assert cli.main(["submit"]) == 130


def test_submit_to_nobody_says_so_at_once(capsys: pytest.CaptureFixture[str]):
    address = f"127.0.0.1:{free_port()}"
    assert cli.main(["submit", "--address", address, "hello"]) == 1
    assert capsys.readouterr().err == f"baton submit: no coordinator at {address}: Connection refused\n"


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help(command: str):
    result = subprocess.run(
        [sys.executable, "-m", "baton.cli", command, "--help"], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0
    assert f"usage: baton {command}" in result.stdout


@pytest.mark.parametrize("command", ["submit", "coordinator", "serve", "doctor", "prefill"])
def test_help_needs_no_engine(command: str):
    """vLLM takes many seconds to import, and `baton submit` has no use for it."""
    code = (
        "import sys; from baton import cli\n"
        f"try: cli.main([{command!r}, '--help'])\n"
        "except SystemExit: pass\n"
        "print([name for name in ('torch', 'vllm', 'nixl') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.stdout.splitlines()[-1] == "[]"
