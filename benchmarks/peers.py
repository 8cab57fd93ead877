"""The systems Baton is measured against, each in a virtual environment of its own.

    python -m benchmarks.peers

Pinned from PyPI and apart from the product's lock: a peer never decides what Baton installs.
`ai-dynamo` is installed without resolution, because one of its requirements (`aisimulate`, the
replay command line) cannot be built in every environment and neither the frontend nor the mocker
imports it; what those two import is listed here.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.layout import PEERS


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    name: str
    pins: tuple[str, ...]
    """Installed first, without their requirements when `requirements` is given."""
    requirements: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        return PEERS / self.name

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def _stamp(self) -> Path:
        return self.folder / "installed.txt"

    @property
    def _recipe(self) -> str:
        return "\n".join((*self.pins, *self.requirements)) + "\n"

    @property
    def is_installed(self) -> bool:
        return self._stamp.is_file() and self._stamp.read_text(encoding="utf-8") == self._recipe

    def install(self) -> None:
        """Make the environment anew unless it already holds exactly these pins."""
        if self.is_installed:
            return
        print(f"installing {self.name}: {' '.join(self.pins)}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(self.folder)], check=True)
        pip = [str(self.python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        if self.requirements:
            subprocess.run([*pip, *self.requirements], check=True)
            subprocess.run([*pip, "--no-deps", *self.pins], check=True)
        else:
            subprocess.run([*pip, *self.pins], check=True)
        self._stamp.write_text(self._recipe, encoding="utf-8")

    def versions(self) -> dict[str, str]:
        return dict(pin.split("==") for pin in self.pins)


VLLM_ROUTER = Peer(name="vllm-router", pins=("vllm-router==0.1.17",))
SGLANG_ROUTER = Peer(name="sglang-router", pins=("sglang-router==0.3.2",))
DYNAMO = Peer(
    name="dynamo",
    pins=("ai-dynamo==1.6.1", "ai-dynamo-runtime==1.6.1"),
    requirements=(
        "aiohttp>=3.14.3,<4", "certifi", "kubernetes>=32.0.1,<33", "msgspec>=0.19",
        "prometheus-client>=0.23.1,<1", "pydantic>=2.10.6,<=2.13.5", "pyzmq>=26", "redis>=6.2,<9",
        "tqdm>=4", "transformers>=4.56", "typing-extensions>=4.10", "uvloop>=0.21", "zstandard>=0.23.1,<1",
    ),
)  # fmt: skip
ALL = (VLLM_ROUTER, SGLANG_ROUTER, DYNAMO)


def main() -> int:
    for peer in ALL:
        peer.install()
        print(f"{peer.name}: {', '.join(' '.join(item) for item in peer.versions().items())}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
