"""What clients may call the fleet's model."""

from __future__ import annotations

from pathlib import PurePath

from coordinator.intake import Intake


class ServedNames:
    """The configured names; without any, the model string the workers gave and its last component."""

    def __init__(self, configured: tuple[str, ...], intake: Intake) -> None:
        self._configured = configured
        self._intake = intake
        self._model: str | None = None
        self._names: tuple[str, ...] = ()

    def names(self) -> tuple[str, ...]:
        """The first is the one answers carry. Empty while no worker has registered."""
        if self._configured:
            return self._configured
        model = self._intake.facts().model
        if model != self._model:
            self._model = model
            short = PurePath(model).name if model is not None else ""
            self._names = tuple(name for name in dict.fromkeys((model, short)) if name)
        return self._names

    def is_served(self, name: str) -> bool:
        return name in self.names()
